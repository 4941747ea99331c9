"""Tables (.csv, .tsv) → rows with named columns: the first row names them. Quotes as in RFC 4180."""

import csv
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regpt.compression import MAX_ROW_BYTES, BufferedStream, lines_of
from regpt.errors import UserError
from regpt.prepare.columns import Columns, missing
from regpt.prepare.document import Unreadable, not_utf8

COMMA = ",;\t|"  # the one that the first line has most of: in many countries spreadsheets write `;`
TAB = "\t"
ESCAPE = 0xDC00  # a byte that is not UTF-8, as Python's `surrogateescape` keeps it


def rows_of_table(
    stream: BufferedStream, path: Path, columns: Columns | None, separator: str | None, delimiters: str
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """
    Raises:
        UserError: a column that is asked for is not there, or is there twice.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = (line.decode("utf-8", "surrogateescape") for line in lines_of(stream, path))
    head = next(lines, "")
    delimiter = max(delimiters, key=head.count)
    reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = partial("{}, line {}".format, path, reader.line_num + 1)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            said = f"{where()}: not a row of a table ({error}); quotes must be doubled and closed"
            yield Unreadable(said, "ragged"), where
            continue
        if fields is None:
            return
        if fields and header is None:  # a line without anything is not a row
            header = checked_header(fields, path, columns.names if columns else ())
        elif fields and header:
            yield row_of(header, fields, where), where


def checked_header(header: list[str], path: Path, names: Sequence[str]) -> list[str]:
    if any("\0" in name for name in header):
        raise UserError(
            f"{path} is not text: it holds zero bytes, as UTF-16 does; convert it to UTF-8, or name its --encoding"
        )
    for name in names:
        if header.count(name) > 1:
            raise UserError(f"{path} has more than one column {name!r}; rename one of them")
        if name not in header:
            raise UserError(f"{path}, line 1: {missing(name, header)}")
    return header


def row_of(header: list[str], fields: list[str], where: Callable[[], str]) -> Any:
    if len(fields) != len(header):
        return Unreadable(f"{where()}: {len(fields)} fields, but the first row has {len(header)}", "ragged")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:
        return not_utf8(where(), ord(error.object[error.start]) - ESCAPE)
    return dict(zip(header, fields))
