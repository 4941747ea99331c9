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

from regpt.errors import UserError, import_extra

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
    """Compression suffix of a file name; empty if it has none."""
    return next((packing for packing in PACKINGS if name.lower().endswith(packing)), "")


@contextmanager
def decompressed(raw: io.BufferedReader, path: Path, packing: str) -> Iterator[BufferedStream]:
    """Open the content of `raw`, the file `path`, decompressed by the suffix `packing`, as it is where that is empty;
    damage raises `Unreadable`."""
    if not packing:
        yield raw
        return
    reader = open_zstd(raw, path) if packing == ".zst" else OPENERS[packing](raw)
    try:
        with reader:
            if not path.stat().st_size:
                raise EOFError("it is empty")
            yield reader
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; errors of the libraries have no errno
            raise
        raise Unreadable(f"{path} is damaged: it does not decompress ({error})", "damaged") from None


def open_zstd(raw: BinaryIO, path: Path) -> BufferedStream:
    """Open Zstandard frames as a stream; a truncated file raises an OSError."""
    pyarrow = import_extra("pyarrow", f"reading {path} needs pyarrow", "data")
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream)


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
