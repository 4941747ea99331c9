"""Consoles that refuse what they are given."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from regpt.console import streams
from regpt.console.streams import lost_text, unfailing

posix = pytest.mark.skipif(os.name != "posix", reason="descriptors as POSIX has them")


@contextlib.contextmanager
def hardened(stream: io.TextIOWrapper) -> Iterator[TextIO]:
    """`stream`, made unfailing; closed afterwards."""
    with contextlib.suppress(OSError), stream, unfailing(stream) as out:
        yield out


def stream_to(descriptor: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")), encoding=encoding)


@posix
def test_a_reader_that_left_costs_text_only():
    reader, writer = os.pipe()
    os.close(reader)
    with hardened(stream_to(writer)) as out:
        for _ in range(3):
            print("x" * 100_000, file=out, flush=True)
        assert lost_text(out) == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_costs_text_only_and_is_named():
    with hardened(stream_to(os.open("/dev/full", os.O_WRONLY))) as out:
        print("x", file=out, flush=True)
        assert lost_text(out) == "No space left on device"


def test_what_can_be_written_is_written(tmp_path):
    with hardened((tmp_path / "log").open("w", encoding="utf-8")) as out:
        print("日本", file=out, flush=True)
        assert lost_text(out) is None
    assert (tmp_path / "log").read_text(encoding="utf-8") == "日本\n"


def test_a_stream_without_descriptor_and_one_that_is_unfailing_stay_as_they_are(tmp_path):
    text = io.StringIO()
    assert unfailing(text) is text
    with hardened((tmp_path / "log").open("w", encoding="utf-8")) as out:
        assert unfailing(out) is out


@posix
def test_a_pipe_that_somebody_made_non_blocking_gets_everything():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = "import sys; sys.stdout.write(str(len(sys.stdin.buffer.read())))"
    with subprocess.Popen([sys.executable, "-c", program], stdin=reader, stdout=subprocess.PIPE) as child:
        os.close(reader)
        with hardened(stream_to(writer)) as out:
            out.write("x" * 1_000_000)
        assert child.communicate()[0] == b"1000000"


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", rb"1 x 2... \u65e5 \xe9"), ("cp1252", b"1 \xd7 2\x85 \\u65e5 \xe9")]
)
def test_characters_that_an_encoding_lacks_are_replaced(tmp_path, monkeypatch, encoding: str, written: bytes):
    with (tmp_path / "stdout").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        streams.harden()
        print("1 × 2… 日 é", flush=True)
    assert (tmp_path / "stdout").read_bytes() == written + os.linesep.encode()


@posix
def test_a_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path):
    """What a library writes to descriptor 1 must not end in a checkpoint."""
    program = (
        "import os; from regpt.console.streams import harden; harden(); print('lost')\n"
        f"file = open({str(tmp_path / 'precious')!r}, 'wb'); os.write(1, b'library'); file.write(b'data')"
    )
    shell = f'exec "{sys.executable}" -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, "sh", program], check=True)
    assert (tmp_path / "precious").read_bytes() == b"data"
