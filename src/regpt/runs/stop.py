"""Ctrl-C and SIGTERM as a request: finish the step, save, leave; at once when asked twice or when it hangs."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

SAME_PRESS_SECONDS = 1.0  # under torchrun one Ctrl-C arrives twice: from the terminal and from the launcher
INTERRUPTED_TWICE = 130
HUNG = 70  # sysexits.h EX_SOFTWARE

EXIT_SAVED = 75  # sysexits.h EX_TEMPFAIL: saved, ready to be started again


@contextlib.contextmanager
def stop_request(seconds: float = 0) -> Iterator[Callable[[], bool]]:
    """`stop_requested()`, true after the first SIGINT or SIGTERM.

    A second one, more than a second later, ends the process at once with exit code 130, also when it waits in a
    collective or for its device; so does the end of `seconds` (0: no limit) after the first, with 70. Nothing on the
    disk is damaged by it: rows of metrics are single writes, checkpoints are renamed when they are whole.

    A thread is told by the interpreter's wake-up descriptor, which a signal writes to whatever the main thread does.
    """
    kinds = (signal.SIGINT, signal.SIGTERM)
    first = threading.Event()
    ours, theirs = socket.socketpair()  # a pipe would not do on Windows
    theirs.setblocking(False)
    thread = threading.Thread(target=watch, args=(ours, {int(kind) for kind in kinds}, first, seconds), daemon=True)
    before = [signal.signal(kind, lambda signum, frame: first.set()) for kind in kinds]
    woken_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield first.is_set
    finally:
        signal.set_wakeup_fd(woken_before)
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
        theirs.close()  # which ends the thread
        thread.join()
        ours.close()


def watch(woken: socket.socket, kinds: set[int], first: threading.Event, seconds: float) -> None:
    """Wait for signals; leave with the process, or when the other end is closed."""
    began: float | None = None
    while True:
        try:
            signals = woken.recv(64)
        except TimeoutError:
            leave(HUNG, f"not stopped {seconds:g} seconds after the signal; what was saved before is untouched")
            return
        if not signals:
            return
        for kind in signals:
            if kind not in kinds:
                continue
            first.set()
            if began is None:
                began = time.monotonic()
                woken.settimeout(seconds or None)
            elif time.monotonic() - began > SAME_PRESS_SECONDS:
                leave(INTERRUPTED_TWICE, "interrupted twice; what was saved before is untouched")
        if began is not None and seconds:
            woken.settimeout(max(began + seconds - time.monotonic(), 1e-3))


def leave(code: int, why: str) -> None:
    """End the process now."""
    with contextlib.suppress(OSError, ValueError):
        print(f"regpt: {why}", file=sys.stderr, flush=True)
    os._exit(code)
