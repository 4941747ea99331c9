"""JSON lines, and .json files of one array of records or of records in a row → rows, one in memory at a time.

An array is divided by its brackets and strings alone, in time that is linear in its length at any depth; what is
between them goes to Python's parser, so that an array's records are read exactly like lines. (The library ijson needs
memory quadratic in the depth, and refuses whole numbers beyond 64 bits.)
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from regpt.compression import MAX_ROW_BYTES, BufferedStream, lines_of, too_long
from regpt.prepare.documents import Columns, Unreadable, not_utf8
from regpt.structured import MAX_CONTAINERS, refuse_many

BLOCK = 1 << 20
STRUCTURE, IN_STRING = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')
Rows = Iterator[tuple[Any, Callable[[], str]]]  # value and place, as in `Row`


def rows_of_lines(stream: BufferedStream, path: Path, columns: Columns | None, separator: str | None) -> Rows:
    for number, line in enumerate(lines_of(stream, path), start=1):
        if line.strip():
            where = partial("{}, line {}".format, path, number)
            yield parse(line, where), where


def parse(data: bytes, where: Callable[[], str], needed: str = "a .jsonl file has one JSON object a line") -> Any:
    """The JSON value in `data`, or an `Unreadable` with the reason."""
    try:
        if len(data) > MAX_CONTAINERS:
            refuse_many(data)
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        return not_utf8(where(), data[error.start])
    except (ValueError, RecursionError) as error:
        return Unreadable(f"{where()}: not JSON ({error}); {needed}", "not_json")


def rows_of_array(stream: BufferedStream, path: Path, columns: Columns | None, separator: str | None) -> Rows:
    """
    Raises:
        Unreadable: the file ends inside a record, or it holds neither an array nor objects.
    """
    for number, data in enumerate(records(iter(partial(stream.read, BLOCK), b""), path), start=1):
        where = partial("{}, record {}".format, path, number)
        yield parse(data, where, "a .json file has one array of objects"), where


def records(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The elements of an array, or the objects that follow each other."""
    text = Scanner(blocks, path)
    first = text.first()
    if first not in (b"[", b"{"):
        what = f"begins with {first!r}" if first else "is empty"
        raise Unreadable(f"{path} {what}; a .json file has one array of objects", "not_json")
    if first == b"[":
        text.next()
        text.take()
        text.taken = 0
        yield from elements(text)
        if text.first():
            raise Unreadable(f"{path} goes on after its array; a .json file has one array of objects", "not_json")
    else:
        yield from objects(text)


def elements(text: "Scanner") -> Iterator[bytes]:
    """Those of the array that has just begun."""
    depth = 1
    while mark := text.next():
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 0 or (depth == 1 and mark == b","):
            element = text.take()[:-1]
            if depth or element.strip():  # an empty array has none
                yield element
            if not depth:
                return
    raise text.cut()


def objects(text: "Scanner") -> Iterator[bytes]:
    depth = 0
    while mark := text.next():
        depth += (mark in b"[{") - (mark in b"]}")
        if depth <= 0:
            depth = 0
            yield text.take()
    if text.first():
        raise text.cut()


class Scanner:
    """JSON text, looked through for its brackets and commas outside strings."""

    def __init__(self, blocks: Iterator[bytes], path: Path) -> None:
        self._blocks, self._path = blocks, path
        self._data, self._at, self._in_string, self.taken = bytearray(), 0, False, 0

    def first(self) -> bytes:
        """The first byte that is not white space, which goes; empty at the end."""
        self._data = self._data.lstrip()
        while not self._data and self._more():
            self._data = self._data.lstrip()
        return bytes(self._data[:1])

    def next(self) -> bytes:
        """The next bracket or comma outside strings; empty at the end."""
        while True:
            found = (IN_STRING if self._in_string else STRUCTURE).search(self._data, self._at)
            if found:
                mark, self._at = found[0], found.end()
                if mark not in b'"\\':
                    return mark
                self._in_string ^= mark == b'"'
                self._at += mark == b"\\"  # what is escaped, perhaps the first byte of the next block
            else:
                self._at = max(self._at, len(self._data))
                if not self._more():
                    return b""

    def take(self) -> bytes:
        """The text before the place that `next` has reached; it goes."""
        taken = bytes(self._data[: self._at])
        del self._data[: self._at]
        self._at, self.taken = 0, self.taken + 1
        return taken

    def cut(self) -> Unreadable:
        return Unreadable(f"{self._path} is damaged: it ends inside its last record", "damaged")

    def _more(self) -> bool:
        if len(self._data) > MAX_ROW_BYTES:
            raise too_long(f"{self._path}, record {self.taken + 1}")
        block = next(self._blocks, b"")
        self._data += block
        return bool(block)
