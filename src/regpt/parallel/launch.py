"""Start one command as several processes of this machine, through torchrun's own machinery; again when one dies.

Whether a group is started again depends on how its processes ended (`regpt.parallel.worker` writes it down): a process
that was killed, or met something unexpected, may do better next time; one that refused its input would not.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from regpt.errors import UsageError

SAVED, INTERRUPTED, UNEXPECTED = 75, 130, 70
DELIBERATE = (1, 2, SAVED, INTERRUPTED)  # a process that ends with one of these says that another try is of no use
STOP_SECONDS = 3600  # after a signal; the processes themselves end sooner (train.stop_seconds)


def launch(
    processes: int,
    args: Sequence[str],
    *,
    again: Callable[[], Sequence[str]] | None = None,
    progress: Callable[[], object] = lambda: None,
    max_restarts: int = 0,
    say: Callable[[str], None] = print,
) -> int:
    """Run `regpt ARGS…` as `processes` processes until they end for good; the exit code of the first that failed, or 0.

    Args:
        again: the arguments to start with after a death.
        progress: something that changes when the run has come further.
        max_restarts: how often in a row, without progress, the processes are started again.

    Raises:
        UsageError: fewer than one process.
    """
    if processes < 1:
        raise UsageError(f"--nproc is {processes}, must be at least 1")
    restarts, reached = 0, progress()
    while True:
        codes, interrupted = run_once(processes, args)
        if interrupted or not any(codes.values()) or not may_do_better(codes):
            return verdict(codes)
        if progress() != reached:
            restarts, reached = 0, progress()
        if restarts == max_restarts:
            return verdict(codes)
        restarts += 1
        args = again() if again is not None else args
        died = ", ".join(f"process {rank} ended with {described(code)}" for rank, code in sorted(codes.items()) if code)
        say(f"{died}; starting all of them again ({restarts} of {max_restarts}): regpt {' '.join(args)}")


def run_once(processes: int, args: Sequence[str]) -> tuple[dict[int, int], bool]:
    """The exit code of every process (negative: the signal that ended it), and whether the launcher got a signal."""
    settings: dict[str, Any] = {}
    if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:  # older torch waits for 30 seconds
        settings["shutdown_timeout"] = STOP_SECONDS
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="regpt",
        max_restarts=0,
        **settings,
    )
    with tempfile.TemporaryDirectory(prefix="regpt-launch-") as folder:
        seen: dict[int, int] = {}
        interrupted, unknown = False, 0
        try:
            elastic_launch(config, sys.executable)("-m", "regpt.parallel.worker", folder, *args)
        except ChildFailedError as failed:
            seen = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        except SignalException as error:
            interrupted, unknown = True, INTERRUPTED if is_second(error) else -signal.SIGTERM
            end_all(Path(folder))  # all have ended, unless this was a second signal
        found = {int(path.stem): int(path.read_text()) for path in Path(folder).glob("*.exit")}
        return {rank: found.get(rank, seen.get(rank, unknown)) for rank in range(processes)}, interrupted


def is_second(error: SignalException) -> bool:
    """Whether the signal came while torchrun was ending the processes because of another one."""
    return isinstance(error.__context__, SignalException)


def end_all(folder: Path) -> None:
    """Kill the processes that have not said how they ended."""
    for path in folder.glob("*.pid"):
        if not path.with_suffix(".exit").exists():
            with contextlib.suppress(OSError):  # it is gone
                os.kill(int(path.read_text()), signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


def may_do_better(codes: dict[int, int]) -> bool:
    """Whether no process ended as it wanted to."""
    return not any(code in DELIBERATE for code in codes.values())


def verdict(codes: dict[int, int]) -> int:
    """One exit code for all: `SAVED` when nothing else is known; 1 for a death."""
    ends = [code for code in codes.values() if code]
    if not ends:
        return 0
    if all(code == SAVED for code in ends):  # what torchrun ended afterwards had nothing left to do
        return SAVED
    if INTERRUPTED in ends:
        return INTERRUPTED
    said = [code for code in ends if code in (1, 2)]
    return said[0] if said else 1


def described(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"
