"""Compressed files → their bytes as a stream, and lines of bounded length; damage is a UserError that names the file.

Some kilobytes of a compressed file may hold a line of gigabytes.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from regpt.errors import UserError

ZSTD_BLOCK = 1 << 10  # compressed bytes at a time: their content, up to 30,000 times larger, is in memory
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
JSONL = tuple(ending + packing for ending in (".jsonl", ".ndjson") for packing in ("", *PACKINGS))
MAX_ROW_BYTES = 256 << 20  # of a line of .jsonl, a record of .json, a row of .csv; long books have some megabytes
BufferedStream = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile  # bytes with `peek`
OPENERS: dict[str, Callable[[BinaryIO], BufferedStream]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


class Unreadable(UserError):
    """A document, or the rest of a file, that cannot be read; `reason` is how a manifest counts it."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # a worker raises it in its process
        return type(self), (str(self), self.reason)


def packing_of(name: str) -> str:
    """The ending that says how a file of this name is compressed; empty if it is not."""
    return next((packing for packing in PACKINGS if name.lower().endswith(packing)), "")


@contextmanager
def decompressed(raw: BinaryIO, path: Path, packing: str | None = None) -> Iterator[BufferedStream]:
    """The content of `raw`, decompressed as the name of `path` says, or `packing`; damage is an `Unreadable`."""
    packing = packing or packing_of(path.name)
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError)
    if packing == ".zst":
        zstandard = import_zstandard(path)
        damage = (EOFError, zstandard.ZstdError)
        reader: Any = io.BufferedReader(ZstdFrames(raw, zstandard), ZSTD_BLOCK)
    else:
        reader = OPENERS[packing](raw)
    try:
        with reader:
            if not path.stat().st_size:
                raise EOFError("it is empty")
            yield reader
    except damage as error:
        raise damaged(path, error) from None
    except OSError as error:
        if error.errno is not None:  # of the disk; the libraries' own have no number
            raise
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> Unreadable:
    return Unreadable(f"{path} is damaged: it does not decompress ({error})", "damaged")


class ZstdFrames(io.RawIOBase):
    """The content of Zstandard frames, one after another; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._new_frame = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._packed, self._content = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and self._advance():
            pass
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count

    def _advance(self) -> bool:
        """Decompress some more; False at the end."""
        self._packed = self._packed or self._raw.read(ZSTD_BLOCK)
        if not self._packed:
            if self._frame:
                raise EOFError("it ends inside a frame")
            return False
        self._frame = self._frame or self._new_frame()
        self._content = memoryview(self._frame.decompress(self._packed))
        self._packed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True


def import_zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {path} needs zstandard; install it with: pip install 'regpt[data]'") from None
    return zstandard


class Readline(Protocol):
    def readline(self, size: int, /) -> bytes: ...


def next_line(stream: Readline, where: Callable[[], str]) -> bytes:
    """The next line with its end; empty at the end of the file.

    Raises:
        UserError: a line of more than `MAX_ROW_BYTES`.
    """
    line = stream.readline(MAX_ROW_BYTES + 1)
    if len(line) > MAX_ROW_BYTES:
        raise too_long(where())
    return line


def lines_of(stream: Readline, path: Path) -> Iterator[bytes]:
    """Every line with its end; see `next_line`."""
    number = 1
    while line := next_line(stream, partial("{}, line {}".format, path, number)):
        yield line
        number += 1


def too_long(where: str) -> UserError:
    return UserError(f"{where}: more than {MAX_ROW_BYTES >> 20} MiB in one row, the most that is read; divide it")
