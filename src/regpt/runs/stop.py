"""Ctrl-C, SIGTERM and SIGHUP as a request: finish the step, save, leave; at once when asked twice or when it hangs.

A run in a process of its own (`regpt train`) ends with it; a run inside somebody else's (Python) leaves it alive.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from regpt.console.lines import print_note
from regpt.parallel.signals import INTERRUPTED, SAME_PRESS_SECONDS, stop_signals, told_of_signals

HUNG = 70  # sysexits.h EX_SOFTWARE
StopRequest = Callable[[float], AbstractContextManager[Callable[[], bool]]]  # of `train.stop_seconds`


@contextlib.contextmanager
def stop_request(seconds: float = 0) -> Iterator[Callable[[], bool]]:
    """`stop_requested()`, true after the first SIGINT, SIGTERM or SIGHUP; a SIGHUP that was ignored (nohup) stays so.

    A second one, more than a second later, ends the process at once with exit code 130, also when it waits in a
    collective or for its device; so does the end of `seconds` (0: no limit) after the first, with 70. Nothing on the
    disk is damaged by it: rows of metrics are single writes, checkpoints are renamed when they are whole.
    """
    asked: list[int] = []  # no Event: its lock would be waited for for ever by a second signal during the first's `set`
    untouched = "what was saved before is untouched"
    before = {kind: signal.signal(kind, lambda signum, frame: asked.append(signum)) for kind in stop_signals()}
    try:
        with told_of_signals(
            first=asked.append,
            second=lambda: leave(INTERRUPTED, f"interrupted twice; {untouched}"),
            late=lambda: leave(HUNG, f"not stopped {seconds:g} seconds after the signal; {untouched}"),
            seconds=seconds,
        ):
            yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


class PoliteStop:
    """Signals as a request inside a process that is not the run's: call it as `stop_request`, then `deliver`.

    A second signal, more than a second after the first, goes to the handlers that were there before (Python's raises
    KeyboardInterrupt for Ctrl-C). In a thread other than the main one, which alone receives signals, nothing is asked.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def __call__(self, seconds: float = 0) -> Iterator[Callable[[], bool]]:
        if threading.current_thread() is not threading.main_thread():
            yield lambda: False
            return
        before = {kind: signal.getsignal(kind) for kind in stop_signals()}

        def note(signum: int, frame: object) -> None:
            now = time.monotonic()
            if self.asked and now - self.asked[0][1] > SAME_PRESS_SECONDS:
                restore()
                signal.raise_signal(signum)
            self.asked.append((signum, now))

        def restore() -> None:
            for kind, handler in before.items():
                signal.signal(kind, signal.SIG_DFL if handler is None else handler)  # None: not installed by Python

        for kind in before:
            signal.signal(kind, note)
        try:
            yield lambda: bool(self.asked)
        finally:
            restore()

    def deliver(self) -> None:
        """Send the request on, now that the run has saved, to the handlers of the process."""
        if self.asked:
            signal.raise_signal(self.asked[0][0])


def leave(code: int, why: str) -> None:
    """End the process now."""
    with contextlib.suppress(OSError, ValueError):
        print_note(why)
    os._exit(code)
