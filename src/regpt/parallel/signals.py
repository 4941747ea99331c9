"""Signals, told to a thread: also while the main thread runs no Python code. Imports nothing heavy."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

HANGUP = [signal.Signals(signal.SIGHUP)] if hasattr(signal, "SIGHUP") else []  # terminal or ssh gone; not on Windows
KINDS = [signal.SIGINT, signal.SIGTERM, *HANGUP]
SAME_PRESS_SECONDS = 1.0  # one request may arrive twice: from the terminal or timeout(1), and from the launcher
GRACE_SECONDS = 5.0  # for a main thread to end by itself
INTERRUPTED = 130
EXIT_SAVED = 75  # sysexits.h EX_TEMPFAIL: saved, ready to be started again


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    return [kind for kind in KINDS if kind not in HANGUP or signal.getsignal(kind) is not signal.SIG_IGN]


def leave_when_terminated() -> None:
    """From now on SIGTERM and SIGHUP end this process with `EXIT_SAVED`, where nothing is to be saved: before the first
    step of a run, which handles signals itself (`runs.stop`), and after the last.

    A main thread that runs no Python code, as it waits for another process, is left after `GRACE_SECONDS`, also after
    Ctrl-C.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # it is done

    def leave(signum: int, frame: object) -> None:
        if threading.main_thread().is_alive():  # else the process is ending with a code of its own
            with contextlib.suppress(OSError):
                name = signal.Signals(signum).name
                os.write(2, f"regpt: ended by {name}; what was saved before is untouched\n".encode())
            sys.exit(EXIT_SAVED)

    def leave_main_thread(kind: int) -> None:
        time.sleep(GRACE_SECONDS)
        os._exit(INTERRUPTED if kind == signal.SIGINT else EXIT_SAVED)

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    nothing = (lambda: None, lambda: None, 0.0)
    threading.Thread(target=watch, args=(ours, leave_main_thread, *nothing), daemon=True).start()
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)  # open as long as the process lives
    for kind in set(stop_signals()) - {signal.SIGINT}:
        signal.signal(kind, leave)
        atexit.register(signal.signal, kind, signal.SIG_IGN)  # the interpreter's end would make it deadly again


@contextlib.contextmanager
def told_of_signals(
    first: Callable[[int], object],
    second: Callable[[], object],
    late: Callable[[], object] = lambda: None,
    seconds: float = 0,
) -> Iterator[None]:
    """While it lasts, a thread calls `first` with one of `stop_signals`, `second` after another one more than
    `SAME_PRESS_SECONDS` later, and `late` when `seconds` (0: no limit) have passed since the first. A SIGHUP is no
    second one: shell, terminal and system each send it, and nobody is there to press twice.

    A thread is told by the interpreter's wake-up descriptor, which a signal writes to whatever the main thread does.
    """
    ours, theirs = socket.socketpair()  # a pipe would not do on Windows
    theirs.setblocking(False)
    thread = threading.Thread(target=watch, args=(ours, first, second, late, seconds), daemon=True)
    woken_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        theirs.close()  # which ends the thread
        thread.join()
        ours.close()


def watch(
    woken: socket.socket,
    first: Callable[[int], object],
    second: Callable[[], object],
    late: Callable[[], object],
    seconds: float,
) -> None:
    """Wait for signals; leave with the process, or when the other end is closed."""
    began: float | None = None
    while True:
        try:
            signals = woken.recv(64)
        except TimeoutError:
            late()
            return
        if not signals:
            return
        for kind in signals:
            if kind not in KINDS:
                continue
            if began is None:
                began = time.monotonic()
                first(kind)
            elif kind not in HANGUP and time.monotonic() - began > SAME_PRESS_SECONDS:
                second()
        if began is not None and seconds:
            woken.settimeout(max(began + seconds - time.monotonic(), 1e-3))
