"""Lines of a file, each of bounded length: some kilobytes of a compressed file may hold a line of gigabytes."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from regpt.errors import UserError

MAX_ROW_BYTES = 256 << 20  # of a line of .jsonl, a record of .json, a row of .csv; long books have some megabytes


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
