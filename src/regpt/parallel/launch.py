"""Start one command as several processes of this machine, through torchrun's own machinery; again when one dies.

Whether a group is started again depends on how its processes ended (`regpt.parallel.worker` writes it down): a process
that was killed, or met something unexpected, may do better next time; one that refused its input would not.
"""

import contextlib
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.utils.api import macros
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from regpt.errors import UsageError
from regpt.parallel.mesh import HANG_SECONDS
from regpt.parallel.signals import EXIT_SAVED as SAVED
from regpt.parallel.signals import HANGUP, INTERRUPTED, stop_signals, told_of_signals

UNEXPECTED = 70
DELIBERATE = (1, 2, INTERRUPTED)  # a process that ends with one of these says that another try is of no use
# And with these, that it was asked to: by the user, or by torchrun as another one died.
TOLD = (SAVED, -signal.SIGTERM, *(-kind for kind in HANGUP))
STOP_SECONDS = 300  # after a signal, for the processes to end by themselves
LOOK_SECONDS = 0.5
GRACE_SECONDS = 5  # more, before they are killed: one that is suspended cannot end itself


def launch(
    processes: int,
    args: Sequence[str],
    *,
    again: Callable[[], Sequence[str]] | None = None,
    progress: Callable[[], object] = lambda: None,
    max_restarts: int = 0,
    stop_seconds: int = STOP_SECONDS,
    hang_seconds: float = HANG_SECONDS,
    say: Callable[[str], None] = print,
) -> int:
    """Run `regpt ARGS…` as `processes` processes until they end for good; the exit code of the first that failed, or 0.

    Args:
        again: the arguments to start with after a death.
        progress: something that changes when the run has come further.
        max_restarts: how often in a row, without progress, the processes are started again.
        stop_seconds: within which they end by themselves after a signal.
        hang_seconds: within which all have ended when one has ended well.

    Raises:
        UsageError: fewer than one process.
    """
    if processes < 1:
        raise UsageError(f"--nproc is {processes}, must be at least 1")
    restarts, reached = 0, progress()
    while True:
        codes, interrupted = run_once(processes, args, stop_seconds, hang_seconds, say)
        if interrupted or not should_restart(codes):
            return verdict(codes, interrupted)
        if progress() != reached:
            restarts, reached = 0, progress()
        if restarts == max_restarts:
            return verdict(codes)
        restarts += 1
        args = again() if again is not None else args
        died = ", ".join(f"process {rank} ended with {described(code)}" for rank, code in sorted(codes.items()) if code)
        say(f"{died}; starting all of them again ({restarts} of {max_restarts}): regpt {' '.join(args)}")


def run_once(
    processes: int, args: Sequence[str], stop_seconds: int, hang_seconds: float, say: Callable[[str], None]
) -> tuple[dict[int, int], bool]:
    """The exit code of every process (negative: the signal that ended it), and whether the launcher got a signal."""
    # Older torch waits for 30 seconds; it ends a run at SIGHUP, also one that nohup has started.
    wanted: dict[str, Any] = {
        "shutdown_timeout": stop_seconds + GRACE_SECONDS,
        "signals_to_handle": ",".join(kind.name for kind in stop_signals()),
    }
    known = {field.name for field in fields(LaunchConfig)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="regpt",
        max_restarts=0,
        **{name: value for name, value in wanted.items() if name in known},
    )
    with tempfile.TemporaryDirectory(prefix="regpt-launch-") as folder:
        seen: dict[int, int] = {}
        interrupted, unknown = False, 0
        try:
            with (
                restored_handlers(),
                told_of_signals(first=lambda kind: None, second=lambda: kill_workers(Path(folder), GRACE_SECONDS)),
                kill_stragglers(Path(folder), hang_seconds, say),
            ):
                elastic_launch(config, sys.executable)("-m", "regpt.parallel.worker", folder, macros.local_rank, *args)
        except ChildFailedError as failed:
            seen = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        except SignalException as error:
            # A process that wrote nothing down was late, or was killed.
            is_second = isinstance(error.__context__, SignalException)  # it came while torchrun ended the processes
            interrupted, unknown = True, INTERRUPTED if is_second else UNEXPECTED
            kill_workers(Path(folder))  # all have ended, unless this was a second signal
        found = {int(path.stem): int(path.read_text()) for path in Path(folder).glob("*.exit")}
        return {rank: found.get(rank, seen.get(rank, unknown)) for rank in range(processes)}, interrupted


@contextlib.contextmanager
def restored_handlers() -> Iterator[None]:
    """torchrun puts its own in their place and leaves them there."""
    before = {kind: signal.getsignal(kind) for kind in stop_signals()}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def kill_stragglers(folder: Path, seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """Kill the processes that have not ended `seconds` after the first: all meet at the end of a run, and then no rank
    waits for another, whose heartbeats (`parallel.pulse`) would report one that hangs."""
    done = threading.Event()

    def look() -> None:
        first = math.inf
        while not done.wait(LOOK_SECONDS):
            if any(folder.glob("*.exit")):
                first = min(first, time.monotonic())
            if time.monotonic() - first > seconds and (here := workers(folder)):
                ranks = ", ".join(map(str, sorted(here)))
                say(f"process {ranks} has not ended {seconds:g} seconds after the others, and is killed")
                kill_workers(folder)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def kill_workers(folder: Path, after: float = 0) -> None:
    """Kill the processes that still run `after` so many seconds."""
    time.sleep(after)
    for process in workers(folder).values():
        with contextlib.suppress(psutil.Error):  # it has just ended
            process.kill()


def workers(folder: Path) -> dict[int, psutil.Process]:
    """Rank → process, of those that have not ended."""
    found = {}
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            words = process.cmdline()
            if str(folder) in words:
                found[int(words[words.index(str(folder)) + 1])] = process
    return found


def should_restart(codes: dict[int, int]) -> bool:
    """Whether a process died, and none ended as it wanted to."""
    ends = [code for code in codes.values() if code]
    return not any(code in DELIBERATE for code in ends) and any(code not in TOLD for code in ends)


def verdict(codes: dict[int, int], interrupted: bool = False) -> int:
    """One exit code for all: `SAVED` when nothing else is known; `UNEXPECTED` for processes that did not end in time
    after a signal; 1 for a death."""
    ends = [code for code in codes.values() if code]
    if not ends:
        return 0
    if INTERRUPTED in ends:
        return INTERRUPTED
    said = [code for code in ends if code in (1, 2)]
    if said:
        return said[0]
    # A run saves when all have agreed, and none leaves before that: another end of others came later, or all are at
    # the beginning still, where nothing is to be saved.
    if SAVED in ends and (interrupted or all(code in TOLD for code in ends)):
        return SAVED
    return UNEXPECTED if interrupted and UNEXPECTED in ends else 1


def described(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"
