"""Start one command as several processes of this machine, each with what torchrun's environment says; again when one
dies.

Whether a group is started again depends on how its processes ended: a process that was killed, or met something
unexpected, may do better next time; one that refused its input would not.
"""

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from regpt.errors import UsageError, word
from regpt.parallel.mesh import HANG_SECONDS, USE_LIBUV, launcher_environment
from regpt.parallel.signals import EXIT_SAVED as SAVED
from regpt.parallel.signals import HANGUP, INTERRUPTED, stop_signals, told_of_signals

UNEXPECTED = 70
DELIBERATE = (1, 2, INTERRUPTED)  # a process that ends with one of these says that another try is of no use
# And with these, that it was asked to: by the user, or by the launcher as another one died.
TOLD = (SAVED, -signal.SIGTERM, *(-kind for kind in HANGUP))
STOP_SECONDS = 300  # after a signal, for the processes to end by themselves
GRACE_SECONDS = 5  # more, before they are killed: one that is suspended cannot end itself
DEATH_SECONDS = 30  # after the death of one, for the others, which now wait for it in vain
LOOK_SECONDS = 0.05
COMMAND = (sys.executable, "-m", "regpt")


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
        say(f"{died}; starting all of them again ({restarts} of {max_restarts}): regpt {' '.join(map(word, args))}")


def run_once(
    processes: int, args: Sequence[str], stop_seconds: int, hang_seconds: float, say: Callable[[str], None]
) -> tuple[dict[int, int], bool]:
    """The exit code of every process (negative: the signal that ended it), and whether the launcher got a signal."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=USE_LIBUV)
    environments = [launcher_environment(rank, processes, store.port) for rank in range(processes)]
    signals: list[int] = []
    with forwarded_signals(signals, group := list[subprocess.Popen[bytes]]()):
        try:
            group += [subprocess.Popen([*COMMAND, *args], env=environment) for environment in environments]
            killed = wait(group, signals, stop_seconds, hang_seconds, say)
        finally:
            for process in group:
                process.kill()
                process.wait()
    codes = {rank: process.returncode for rank, process in enumerate(group)}
    if signals:
        codes |= dict.fromkeys(killed, INTERRUPTED if len(signals) > 1 else UNEXPECTED)
    elif codes[0] in (0, SAVED):  # the main process has ended well, so nothing was left to do
        codes |= dict.fromkeys(killed, 0)
    return codes, bool(signals)


@contextlib.contextmanager
def forwarded_signals(seen: list[int], group: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Send the first signal that asks this process to stop, and a second one, to the processes of `group`; `seen` gets
    them."""

    def forward(kind: int = signal.SIGINT) -> None:
        seen.append(kind)
        for process in group:
            with contextlib.suppress(ValueError):  # Windows sends no SIGINT; its Ctrl-C reaches all of a console
                process.send_signal(kind)

    before = {kind: signal.signal(kind, lambda signum, frame: None) for kind in stop_signals()}
    try:
        with told_of_signals(first=forward, second=forward):
            yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def wait(
    group: Sequence[subprocess.Popen[bytes]],
    signals: Sequence[int],
    stop_seconds: float,
    hang_seconds: float,
    say: Callable[[str], None],
) -> list[int]:
    """Return when all have ended; the ranks of those that had to be killed.

    A signal allows `stop_seconds` and some more; the end of one that ended well allows `hang_seconds`: all meet at the
    end of a run, and then no rank waits for another, whose heartbeats would report one that hangs.
    """
    state, since = "", time.monotonic()
    while running := [rank for rank, process in enumerate(group) if process.poll() is None]:
        ends = [process.returncode for process in group if process.returncode is not None]
        before = state
        if len(signals) > 1:
            state, seconds = "interrupted twice", float(GRACE_SECONDS)
        elif signals:
            state, seconds = "asked to stop", stop_seconds + GRACE_SECONDS
        elif any(code not in (0, SAVED) for code in ends):
            state, seconds = "one failed", DEATH_SECONDS
        else:
            state, seconds = ("one ended", hang_seconds) if ends else ("", math.inf)
        if state != before:
            since = time.monotonic()
        if state == "one failed" != before:
            for rank in running:
                group[rank].terminate()
        if time.monotonic() - since > seconds:
            if state == "one ended":
                ranks = ", ".join(map(str, running))
                say(f"process {ranks} has not ended {seconds:g} seconds after the others, and is killed")
            for rank in running:
                group[rank].kill()
                group[rank].wait()
            return running
        time.sleep(LOOK_SECONDS)
    return []


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
