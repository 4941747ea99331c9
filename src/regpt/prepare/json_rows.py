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
NEEDED = "a .json file has one array of objects"
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
        yield parse(data, where, NEEDED), where


def records(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The elements of an array, or the objects that follow each other."""
    text, array, begun, in_string, at, depth, number = bytearray(), False, False, False, 0, 0, 1
    for block in blocks:
        text += block
        if not begun and (text := text.lstrip()):
            begun, array = True, text[:1] == b"["
            if text[:1] not in (b"[", b"{"):
                raise Unreadable(f"{path} begins with {bytes(text[:1])!r}; {NEEDED}", "not_json")
            del text[:array]
        while found := (IN_STRING if in_string else STRUCTURE).search(text, at):
            mark, at = found[0], found.end()
            if mark in b'"\\':
                in_string ^= mark == b'"'
                at += mark == b"\\"  # the escaped byte, perhaps the first of the next block
                continue
            depth += (mark in b"[{") - (mark in b"]}")
            if depth < 0 or (depth == 0 and (mark == b"," or not array)):
                record = bytes(text[: at - array])
                del text[:at]
                if depth == 0 or not array or record.strip():  # an empty array has none
                    yield record
                if array and depth < 0:
                    if text.strip() or any(block.strip() for block in blocks):
                        raise Unreadable(f"{path} goes on after its array; {NEEDED}", "not_json")
                    return
                at, depth, number = 0, 0, number + 1
        at = max(at, len(text))
        if len(text) > MAX_ROW_BYTES:
            raise too_long(f"{path}, record {number}")
    if not begun:
        raise Unreadable(f"{path} is empty; {NEEDED}", "not_json")
    if array or text.strip():
        raise Unreadable(f"{path} is damaged: it ends inside its last record", "damaged")
