"""Text in other encodings → UTF-8, some at a time. A byte-order mark says which one it is, and is left out."""

import codecs
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from regpt.compression import BufferedStream, decompressed, packing_of
from regpt.errors import UsageError
from regpt.prepare.documents import Unreadable

BLOCK = 1 << 18
BOM_UTF8 = codecs.BOM_UTF8
WIDE = {  # the longer marks first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def check_encoding(name: str) -> None:
    """Raise a UsageError unless `name` is an encoding of text."""
    try:
        b"a".decode(name)
    except UnicodeError:  # half a character
        return
    except (LookupError, ValueError):  # not one, or not of text; a NUL character
        raise UsageError(
            f"--encoding {name!r} is not known; use one of Python's, such as utf-8, latin-1, cp1252, utf-16, gb18030"
        ) from None


def mark_of(head: bytes) -> tuple[bytes, str] | None:
    """The byte-order mark that `head` (four bytes or more) begins with, and its encoding."""
    marks = {**WIDE, BOM_UTF8: "utf-8"}
    return next(((mark, name) for mark, name in marks.items() if head.startswith(mark)), None)


def is_utf8(path: Path, encoding: str) -> bool:
    """Whether `path` is read as the bytes that it has: in UTF-8, with or without a mark."""
    with path.open("rb") as file:
        mark = mark_of(file.read(4))
    return codecs.lookup(encoding).name == "utf-8" and (mark is None or mark[0] == BOM_UTF8)


def has_mark(path: Path) -> bool:
    """Whether the text of `path` begins with a byte-order mark."""
    packing = packing_of(path.name)
    try:
        with path.open("rb") as raw, decompressed(raw, path, packing) if packing else nullcontext(raw) as stream:
            return mark_of(stream.read(4)) is not None
    except Unreadable:  # says so when it is read
        return False


def in_utf8(stream: BufferedStream, encoding: str, path: Path) -> BufferedStream:
    """`stream` from after its mark on, as UTF-8."""
    mark = mark_of(stream.peek(4)[:4]) if codecs.lookup(encoding).name == "utf-8" else None
    if mark and mark[1] == "utf-8":
        stream.read(len(BOM_UTF8))
    elif mark:
        encoding = mark[1]
    if codecs.lookup(encoding).name == "utf-8":
        return stream
    return io.BufferedReader(Recoded(stream, encoding, path), BLOCK)


class Recoded(io.RawIOBase):
    """The text of a stream in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO | BufferedStream, encoding: str, path: Path) -> None:
        self._stream, self._encoding, self._path = stream, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._stream.read(BLOCK)
            self._ended = not block
            try:
                self._ready = memoryview(self._decoder.decode(block, final=self._ended).encode())
            except UnicodeError as error:
                raise Unreadable(
                    f"{self._path} is not text in the encoding {self._encoding} ({error})", "not_text"
                ) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
