"""Signals: the first asks, the second ends at once, whatever the main thread is doing."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from regpt.parallel import signals
from regpt.parallel.signals import KINDS
from regpt.runs.stop import PoliteStop, stop_request

POSIX = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to another process")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_signal_is_a_request_and_the_handlers_are_put_back(kind: signal.Signals):
    before = [signal.getsignal(k) for k in KINDS]
    with stop_request() as requested:
        assert not requested()
        signal.raise_signal(kind)
        assert requested()
        signal.raise_signal(kind)  # the same press, that a launcher passes on
    assert [signal.getsignal(k) for k in KINDS] == before
    assert signal.set_wakeup_fd(-1) == -1


@POSIX
@pytest.mark.parametrize("stop", [stop_request, PoliteStop()])
def test_under_nohup_a_closed_terminal_is_no_request(stop):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop() as requested:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert not requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@POSIX
@pytest.mark.parametrize(("again", "ends"), [(signal.SIGHUP, 0), (signal.SIGTERM, 1)])
def test_a_terminal_that_is_closed_is_no_second_request(monkeypatch, again: signal.Signals, ends: int):
    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", -1.0)
    seen: list[object] = []
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(bytes([signal.SIGHUP, again]))
    with ours:
        signals.watch(ours, seen.append, lambda: seen.append("second"), lambda: None, 0)
    assert seen == [signal.SIGHUP, *["second"] * ends]


# Sends the second signal while the first one's handler is at its n-th call of a Python function.
AT_ONCE = """
import signal, sys
from regpt.parallel import signals
from regpt.parallel.signals import KINDS
from regpt.runs.stop import PoliteStop, stop_request
for n in range(20):
    calls = []
    def again(frame, event, arg):
        if event == "call":
            calls.append(frame.f_code.co_name)
            if len(calls) == n:
                signal.raise_signal(signal.SIGTERM)
    with stop_request() as requested:
        sys.setprofile(again)
        signal.raise_signal(signal.SIGTERM)
        sys.setprofile(None)
        assert requested()
print("done")
"""


def test_two_signals_at_once_are_one_request():
    """As timeout(1) sends them, to its child and to the child's group; the first code had a lock there."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", AT_ONCE], env=env, capture_output=True, text=True, timeout=60)
    assert run.stdout == "done\n", run.stderr


# A process whose main thread runs no Python code when the signals come, as in a collective that hangs.
BLOCKED = """
import ctypes, sys
from regpt.parallel import signals
from regpt.parallel.signals import KINDS
from regpt.runs import stop
signals.SAME_PRESS_SECONDS = float(sys.argv[1])
def blocked_in_c():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    while True:  # the second call waits for ever, and no signal makes it return: handlers in Python never run
        libc.pthread_mutex_lock(mutex)
with stop.stop_request(seconds=float(sys.argv[2])):
    print("ready", flush=True)
    blocked_in_c()
"""


def blocked(*args: float) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BLOCKED, *map(str, args)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@POSIX
def test_a_second_signal_ends_a_process_that_hangs_with_130():
    process = blocked(0.0, 0.0)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # the second may come with the first: signals do not queue
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 130
    assert "interrupted twice; what was saved before is untouched" in process.communicate()[1]


@POSIX
def test_a_process_that_does_not_stop_in_time_is_ended():
    process = blocked(60.0, 0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 70
    assert "not stopped 0.5 seconds after the signal" in err
