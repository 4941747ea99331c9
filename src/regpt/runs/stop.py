"""Ctrl-C and SIGTERM as a request: finish the step, save, leave; at once when asked twice or when it hangs."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from regpt.console.lines import print_note
from regpt.parallel.signals import INTERRUPTED, KINDS, told_of_signals

HUNG = 70  # sysexits.h EX_SOFTWARE


@contextlib.contextmanager
def stop_request(seconds: float = 0) -> Iterator[Callable[[], bool]]:
    """`stop_requested()`, true after the first SIGINT or SIGTERM.

    A second one, more than a second later, ends the process at once with exit code 130, also when it waits in a
    collective or for its device; so does the end of `seconds` (0: no limit) after the first, with 70. Nothing on the
    disk is damaged by it: rows of metrics are single writes, checkpoints are renamed when they are whole.
    """
    asked: list[int] = []  # no Event: its lock would be waited for for ever by a second signal during the first's `set`
    untouched = "what was saved before is untouched"
    before = [signal.signal(kind, lambda signum, frame: asked.append(signum)) for kind in KINDS]
    try:
        with told_of_signals(
            first=asked.append,
            second=lambda: leave(INTERRUPTED, f"interrupted twice; {untouched}"),
            late=lambda: leave(HUNG, f"not stopped {seconds:g} seconds after the signal; {untouched}"),
            seconds=seconds,
        ):
            yield lambda: bool(asked)
    finally:
        for kind, handler in zip(KINDS, before):
            signal.signal(kind, handler)


def leave(code: int, why: str) -> None:
    """End the process now."""
    with contextlib.suppress(OSError, ValueError):
        print_note(why)
    os._exit(code)
