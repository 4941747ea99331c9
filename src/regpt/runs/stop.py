"""Ctrl-C and SIGTERM as a request: finish the step, save, leave."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

SAME_PRESS_SECONDS = 1.0  # under torchrun one Ctrl-C arrives twice: from the terminal and from the launcher

EXIT_SAVED = 75  # sysexits.h EX_TEMPFAIL: saved, ready to be started again


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """`stop_requested()`, true after the first SIGINT or SIGTERM; a second one raises KeyboardInterrupt at once."""
    first: list[float] = []

    def note(signum: int, frame: object) -> None:
        if first and time.monotonic() - first[0] > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
        if not first:
            first.append(time.monotonic())

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield lambda: bool(first)
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
