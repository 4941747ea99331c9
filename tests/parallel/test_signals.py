"""A signal before the first step of a run, or after the last: nothing is to be saved."""

import os
import signal
import subprocess
import sys

import pytest
import tyro

from regpt.cli.parse import parse
from regpt.cli.train import Train
from regpt.parallel import signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals to another process")

BEGIN = """
import atexit, ctypes, sys, threading
from regpt.parallel import signals
signals.GRACE_SECONDS = 0.2
signals.leave_when_terminated()
def blocked_in_c():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    threading.Timer(0.2, ready).start()  # says it when this thread is blocked
    while True:  # the second call waits for ever, and no signal makes it return: handlers in Python never run
        libc.pthread_mutex_lock(mutex)
def ready():
    print("ready", flush=True)
"""


def ended(rest: str, kind: signal.Signals) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that gets `kind` while it is doing `rest`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", BEGIN + rest], env=env, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_process_that_has_begun_nothing_with_75(kind: signal.Signals):
    code, out, err = ended("ready(); sys.stdin.read()", kind)
    assert (code, out) == (75, "")
    assert err == f"regpt: ended by {kind.name}; what was saved before is untouched\n"


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_so_does_it_when_the_main_thread_waits_for_another_process(kind: signal.Signals, code: int):
    assert ended("blocked_in_c()", kind)[:2] == (code, "")


def test_a_process_that_is_ending_keeps_its_exit_code():
    """`timeout` may send a second signal while the first one's checkpoint is on the disk already."""
    ending = "atexit.register(lambda: (ready(), sys.stdin.read())); sys.exit(3)"
    assert ended(ending, signal.SIGTERM) == (3, "", "")


def test_nothing_heavy_is_imported_before_it_works():
    code = "import sys, regpt.parallel.signals; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_a_signal_while_the_command_line_is_read_is_no_usage_error(monkeypatch):
    def terminated(*args, **kwargs):
        raise SystemExit(signals.EXIT_SAVED)

    monkeypatch.setattr(tyro, "cli", terminated)
    with pytest.raises(SystemExit) as end:
        parse(Train, ["quickstart"], prog="regpt train")
    assert end.value.code == 75
