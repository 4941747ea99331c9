"""Files of text → documents, one at a time and always in the same order.

A table has the reader of each suffix; all but .parquet may also be compressed. The text is decoded, byte-order marks
are left out, and nothing else is changed.
"""

import codecs
import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from regpt.compression import MAX_ROW_BYTES, PACKINGS, BufferedStream, decompressed, lines_of, next_line, packing_of
from regpt.errors import UsageError, UserError, nearest
from regpt.prepare.documents import Columns, Document, FilePart, Row, Unreadable, missing, not_utf8
from regpt.prepare.json_rows import Rows, parse, rows_of_array, rows_of_lines
from regpt.prepare.parquet import read_parquet, row_groups
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions

SNIFFED = 8000  # bytes in which git, too, looks for a zero to tell binary files from text
BLOCK = 1 << 20
MAX_PACKED_TEXT = 1 << 30  # bytes of a compressed file that is one document: a few kilobytes may hold a terabyte
COMMA = ",;\t|"  # the one that the first line has most of: in many countries spreadsheets write `;`
TAB = "\t"
ESCAPE = 0xDC00  # a byte that is not UTF-8, as Python's `surrogateescape` keeps it
BOM_UTF8 = codecs.BOM_UTF8
WIDE = {  # the longer marks first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def whole_text(stream: BufferedStream, path: Path, columns: Columns | None, separator: str | None) -> Rows:
    """One document, or those between separators."""
    if b"\0" in stream.peek(SNIFFED)[:SNIFFED]:
        raise Unreadable(
            f"{path} is not text: it holds zero bytes, as binary files and UTF-16 do; "
            "convert it to UTF-8, or name its --encoding",
            "not_text",
        )
    if separator is None:
        data = stream.read() if isinstance(stream, io.BufferedReader) else read_packed(stream, path)
        yield decode(data, path), partial(str, path)
        return
    blocks = iter(partial(stream.read, BLOCK), b"")
    for number, text in enumerate(split_at(blocks, separator.encode())):
        yield decode(text, path), partial("{}, document {}".format, path, number)


def read_packed(stream: BufferedStream, path: Path) -> bytes:
    data = stream.read(MAX_PACKED_TEXT + 1)
    if len(data) > MAX_PACKED_TEXT:
        raise UserError(f"{path} holds one document of more than {MAX_PACKED_TEXT >> 20:,} MiB; decompress it")
    return data


def split_at(blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """What is between separators, without line ends around it; the first and the last only if they are not empty."""
    waiting, overlap, first = [], len(separator) - 1, True
    for block in blocks:
        *ended, rest = ((waiting.pop() if waiting else b"") + block).split(separator)
        for text in ended:
            text, waiting = b"".join([*waiting, text]).strip(b"\r\n"), []
            if text or not first:
                yield text
            first = False
        kept = max(0, len(rest) - overlap)  # what follows may be the beginning of a separator
        waiting += [rest[:kept], rest[kept:]]
    if text := b"".join(waiting).strip(b"\r\n"):
        yield text


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


READERS: dict[str, Callable[[BufferedStream, Path, Columns | None, str | None], Rows]] = {
    ".txt": whole_text,
    ".md": whole_text,
    ".jsonl": rows_of_lines,
    ".ndjson": rows_of_lines,
    ".json": rows_of_array,
    ".csv": partial(rows_of_table, delimiters=COMMA),
    ".tsv": partial(rows_of_table, delimiters=TAB),
}
PARQUET = (".parquet",)
SUFFIXES = (*PARQUET, *(ending + packing for ending in READERS for packing in ("", *PACKINGS)))
TABLES = (".json", ".csv", ".tsv")  # in a folder often something else: read where there is nothing better
ALLOWED = f"{', '.join([*READERS, *PARQUET])} (all but the last also with {', '.join(PACKINGS)})"


def check_text(options: TextOptions) -> None:
    """Raise a UsageError for options that nothing can be read with."""
    if options.format is not None and f".{options.format}" not in SUFFIXES:
        endings = [ending.removeprefix(".") for ending in (*READERS, *PARQUET)]
        raise UsageError(
            f"--format is {options.format!r}{nearest(options.format, endings)}, must be one of {', '.join(endings)}, "
            f"perhaps with {', '.join(PACKINGS)}"
        )
    if options.separator is not None and not options.separator.strip("\r\n"):
        raise UsageError("--separator must be more than line ends; give the text that stands between documents")
    if options.template is not None and options.text_column != TEXT_OPTIONS.text_column:
        raise UsageError("--text-column and --template both say where the text is; give one of them")
    check_encoding(options.encoding)
    Columns(options.text_column, options.template)


def suffix_of(name: str | Path) -> str | None:
    """The ending by which a file of this name is read; None for other kinds."""
    return next((suffix for suffix in SUFFIXES if str(name).lower().endswith(suffix)), None)


def ending_of(path: Path, options: TextOptions) -> str:
    """The ending as which `path` is read: of other names, plain text."""
    return f".{options.format}" if options.format else suffix_of(path) or ".txt" + packing_of(path.name)


def is_text(ending: str) -> bool:
    """Whether a file read as one with this ending is plain text, in which a separator may stand."""
    return ending.startswith((".txt", ".md"))


def parts_of(path: Path, target_bytes: int, options: TextOptions = TEXT_OPTIONS) -> list[FilePart]:
    """The parts of `path`, each of at least `target_bytes` but the last, or as near as its format allows.

    Raises:
        UserError: a damaged parquet file.
    """
    ending, size = ending_of(path, options), path.stat().st_size
    if ending in (".jsonl", ".ndjson") and size and is_utf8(path, options.encoding):
        edges = [*range(0, size, target_bytes), size]
        return [FilePart(start, stop, stop - start) for start, stop in itertools.pairwise(edges)]
    if ending in PARQUET:
        try:
            return row_groups(path, target_bytes)
        except Unreadable:
            if options.on_error == "stop":
                raise
    return [FilePart(0, 1, size)]


def read_documents(path: Path, options: TextOptions = TEXT_OPTIONS, part: FilePart | None = None) -> Iterator[Document]:
    """The documents of `path`, or of one part of it, in order; an empty one, or a null, is an empty text.

    Raises:
        UserError: invalid UTF-8, a missing or non-text column, a damaged file; names file and line. With `on_error`
            `skip` such a document has an `error` instead, and so has the rest of a damaged file.
    """
    columns = Columns(options.text_column, options.template)
    skip = options.on_error == "skip"
    try:
        for row in read_table_rows(path, options, part, columns):
            try:
                if isinstance(row.value, Unreadable):
                    raise row.value
                text = columns.text(row.value, row.where)
            except Unreadable as error:
                if not skip:
                    raise
                yield Document("", row.source_bytes, error)
                continue
            yield from divided(text, row.source_bytes, options.separator)
    except Unreadable as error:
        if not skip:
            raise
        yield Document("", 0.0, error)


def divided(text: str, source_bytes: float, separator: str | None) -> Iterator[Document]:
    """`text`, cut at `separator`."""
    if not separator or separator not in text:
        yield Document(text, source_bytes)
        return
    texts = [part.decode() for part in split_at(iter([text.encode()]), separator.encode())]
    yield from (Document(part, source_bytes / len(texts)) for part in texts)


def read_table_rows(
    path: Path, options: TextOptions = TEXT_OPTIONS, part: FilePart | None = None, columns: Columns | None = None
) -> Iterator[Row]:
    """What documents are made of; of .parquet only the `columns`, if they are given.

    Raises:
        UserError: the file cannot be read, or it is not of its kind.
    """
    ending = ending_of(path, options)
    packing = packing_of(ending)
    try:
        if ending in PARQUET:
            yield from read_parquet(path, columns, part)
        elif ending in (".jsonl", ".ndjson") and is_utf8(path, options.encoding):
            yield from read_lines(path, part or FilePart(0, path.stat().st_size, 0))
        else:
            with path.open("rb") as raw, decompressed(raw, path, packing) as stream:
                before, read = 0, READERS[ending.removesuffix(packing)]
                text = in_utf8(stream, options.encoding, path)
                for value, where in read(text, path, columns, options.separator):
                    before, consumed = raw.tell(), raw.tell() - before  # of the file itself
                    yield Row(value, consumed, where)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def read_lines(path: Path, part: FilePart) -> Iterator[Row]:
    """The rows whose lines start in [part.start, part.stop)."""
    with path.open("rb") as raw:
        at = part.start
        if at:  # the line that holds the byte before belongs to the part before
            raw.seek(at - 1)
            at += len(next_line(raw, partial(place_of, path, at - 1))) - 1
        while at < part.stop and (line := next_line(raw, partial(place_of, path, at))):
            where = partial(place_of, path, at)
            content = line if at else line.removeprefix(BOM_UTF8)
            if content.strip():
                yield Row(parse(content, where), len(line), where)
            at += len(line)


def place_of(path: Path, at: int) -> str:
    """File and line of the byte `at`: lines are counted only for a message."""
    with path.open("rb") as raw:
        lines = sum(block.count(b"\n") for block in blocks(raw, at))
    return f"{path}, line {1 + lines}"


def blocks(raw: BinaryIO, stop: int) -> Iterator[bytes]:
    """The bytes before `stop`, some at a time."""
    while raw.tell() < stop and (block := raw.read(min(BLOCK, stop - raw.tell()))):
        yield block


def decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise not_utf8(f"{path}, line {line}", data[error.start]) from None


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
    try:
        with path.open("rb") as raw, decompressed(raw, path, packing_of(path.name)) as stream:
            return mark_of(stream.read(4)) is not None
    except Unreadable:  # raised again when it is read
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
