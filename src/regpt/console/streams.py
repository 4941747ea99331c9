"""stdout and stderr that never fail: a reader that left, a full disk or a foreign encoding costs text, never work."""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import IO, Any, TextIO

from regpt.errors import UsageError

ASCII = {"×": "x", "·": "-", "–": "-", "—": "-", "…": "...", "█": "#", "±": "+-", "→": "->", "✓": "+", "✗": "x"}
ERRORS = "regpt.console"


class Unfailing(io.RawIOBase):
    """A raw stream that drops writes that the stream below refuses, and keeps the error in `lost`."""

    def __init__(self, stream: TextIO):
        self.stream = stream  # which would close what is below it if nobody held it
        self.below: Any = getattr(stream.buffer, "raw", stream.buffer)
        self.lost: OSError | ValueError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := self.below.write(data)) is None:  # somebody made the pipe non-blocking
                select.select([], [self.below], [])
            return written
        except (OSError, ValueError) as error:
            self.lost = self.lost or error
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.below.fileno()

    def isatty(self) -> bool:
        return self.below.isatty()


def harden() -> None:
    """Make stdout and stderr of this process unfailing, and keep the three standard descriptors open: what a library
    writes to a closed one would otherwise end in the next file that is opened. For processes of our own only."""
    codecs.register_error(ERRORS, plain_ascii)
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    sys.stdout, sys.stderr = unfailing(sys.stdout), unfailing(sys.stderr)


def unfailing(stream: TextIO | None) -> TextIO:
    """`stream`, None where it was closed, with the same encoding, on an `Unfailing` one."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    if buffer is None or isinstance(getattr(buffer, "raw", None), Unfailing):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Unfailing(stream)),
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def plain_ascii(error: UnicodeError) -> tuple[str, int]:
    """Handler of characters that an encoding lacks: typographic ones in ASCII, the rest as `\\xe9`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text, end = codecs.backslashreplace_errors(error)
    given = error.object[error.start : error.end]
    if any(c in ASCII for c in given):
        text = "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in given)
    return str(text), end


def lost_text(stream: IO[str] | None) -> str | None:
    """Why text of a hardened stream was dropped; None where all of it was written, "" where its reader left."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    error = raw.lost if isinstance(raw, Unfailing) else None
    if error is None:
        return None
    return (
        ""
        if isinstance(error, OSError) and error.errno == errno.EPIPE
        else getattr(error, "strerror", "") or str(error)
    )


def read_stdin() -> bytes:
    """All of standard input.

    Raises:
        UsageError: it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed; pipe the text into this command")
    return sys.stdin.buffer.read()
