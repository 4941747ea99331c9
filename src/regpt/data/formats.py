"""Files of text → documents, one at a time and always in the same order.

`.txt` and `.md` hold one document a file, `.jsonl` (also `.gz`, `.zst`) one a line, `.parquet` one a row. The text is
decoded from UTF-8 and not changed in any other way.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from regpt.errors import UserError

TEXT, JSONL, PARQUET = (".txt", ".md"), (".jsonl", ".jsonl.gz", ".jsonl.zst"), (".parquet",)
SUFFIXES = (*TEXT, *JSONL, *PARQUET)
ALLOWED = ", ".join(SUFFIXES)
SNIFFED = 8000  # bytes in which git, too, looks for a zero to tell binary files from text
ZSTD_BLOCK = 1 << 14  # compressed bytes at a time: their content, up to thousands of times larger, is in memory
PARQUET_BUFFER = 1 << 20  # of a column that is read at a time, instead of its whole row group
BATCH_BYTES, BATCH_ROWS = 1 << 20, 1024  # of a row group that are Python strings at a time, at most


class Document(NamedTuple):
    """A text, and the bytes of its file that reading it consumed (for progress: they sum to its size)."""

    text: str
    source_bytes: float


class Part(NamedTuple):
    """Part of a file: row groups of .parquet, bytes of .jsonl (the lines that start there), 0 to 1 for a whole file.

    `bytes` is its share of the file's size; the shares sum to it.
    """

    start: int
    stop: int
    bytes: int


def suffix_of(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def parts_of(path: Path, target_bytes: int) -> list[Part]:
    """The parts of `path`, each of at least `target_bytes` but the last, or as near as its format allows.

    Raises:
        UserError: a damaged parquet file.
    """
    suffix, size = suffix_of(path), path.stat().st_size
    if suffix == ".jsonl" and size:
        edges = [*range(0, size, target_bytes), size]
        return [Part(start, stop, stop - start) for start, stop in itertools.pairwise(edges)]
    if suffix in PARQUET:
        return row_groups(path, target_bytes)
    return [Part(0, 1, size)]


def row_groups(path: Path, target_bytes: int) -> list[Part]:
    """Neighbouring row groups until their compressed columns, scaled to the size of the file, reach `target_bytes`."""
    with opened_parquet(path) as file:
        groups = [
            sum(group.column(k).total_compressed_size for k in range(group.num_columns))
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups))
        ]
    size, total, parts, start, before, seen = path.stat().st_size, max(1, sum(groups)), [], 0, 0, 0
    for i, group in enumerate(groups, start=1):
        seen += group
        position = size if i == len(groups) else size * seen // total
        if position - before >= target_bytes or i == len(groups):
            parts.append(Part(start, i, position - before))
            start, before = i, position
    return parts or [Part(0, 0, size)]


def read_documents(path: Path, text_column: str, part: Part | None = None) -> Iterator[Document]:
    """The documents of `path`, or of one part of it, in order; an empty one, or a null, is an empty text.

    Raises:
        UserError: invalid UTF-8, a missing or non-text column, a damaged file; names file and line.
    """
    suffix = suffix_of(path)
    try:
        if suffix in TEXT:
            yield read_text(path)
        elif suffix == ".jsonl":
            yield from read_lines(path, text_column, part or Part(0, path.stat().st_size, 0))
        elif suffix in JSONL:
            yield from read_packed_lines(path, text_column)
        else:
            yield from read_parquet(path, text_column, part)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def read_text(path: Path) -> Document:
    data = path.read_bytes()
    if b"\0" in data[:SNIFFED]:
        raise UserError(f"{path} is not text: it holds zero bytes, as binary files and UTF-16 do; convert it to UTF-8")
    return Document(decode(data, path), len(data))


def decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8; convert the file to UTF-8"
        ) from None


def read_packed_lines(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as raw, decompressed(raw, path) as lines:
        before = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = text_of_line(decode(line, path, number), column, f"{path}, line {number}")
                before, consumed = raw.tell(), raw.tell() - before  # of the file itself
                yield Document(text, consumed)


def read_lines(path: Path, column: str, part: Part) -> Iterator[Document]:
    """The documents whose lines start in [part.start, part.stop)."""
    with path.open("rb") as raw:
        at = part.start
        if at:  # the line that holds the byte before belongs to the part before
            raw.seek(at - 1)
            at += len(raw.readline()) - 1
        while at < part.stop and (line := raw.readline()):
            if line.strip():
                yield Document(text_at(line, path, column, at), len(line))
            at += len(line)


def text_at(line: bytes, path: Path, column: str, at: int) -> str:
    """The text of the line that starts at byte `at`; lines are counted only for a message."""
    try:
        return text_of_line(decode(line, path), column, "")
    except UserError:
        with path.open("rb") as raw:
            number = 1 + sum(block.count(b"\n") for block in blocks(raw, at))
        return text_of_line(decode(line, path, number), column, f"{path}, line {number}")


def blocks(raw: BinaryIO, stop: int, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes before `stop`, some at a time."""
    while raw.tell() < stop and (block := raw.read(min(size, stop - raw.tell()))):
        yield block


def text_of_line(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a .jsonl file has one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object, so it has no column {column!r}")
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}, there are {', '.join(row) or 'none'}; name it with --text-column"
        )
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: column {column!r} is not text but {type(text).__name__}; name another with --text-column"
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: the text has a lone surrogate (\\ud800…), which is no character; repair it"
        ) from None
    return text or ""


@contextmanager
def decompressed(raw: BinaryIO, path: Path) -> Iterator[Iterable[bytes]]:
    """Lines of `raw`, decompressed as the name of `path` says; damage is a UserError."""
    if suffix_of(path) == ".jsonl.gz":
        reader, damage = gzip.GzipFile(fileobj=raw), (gzip.BadGzipFile, EOFError, zlib.error)
    else:
        zstandard = import_zstandard(path)
        reader, damage = io.BufferedReader(ZstdFrames(raw, zstandard), ZSTD_BLOCK), (EOFError, zstandard.ZstdError)
    try:
        with reader:
            if not path.stat().st_size:
                raise EOFError("it is empty")
            yield reader
    except damage as error:
        raise UserError(f"{path} is damaged: it does not decompress ({error})") from None


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


def read_parquet(path: Path, column: str, part: Part | None = None) -> Iterator[Document]:
    with opened_parquet(path) as file:
        check_column(file.schema_arrow, column, path)
        groups = range(part.start, part.stop) if part else range(file.metadata.num_row_groups)
        rows = [file.metadata.row_group(i).num_rows for i in range(groups.stop)]
        share = (part.bytes if part else path.stat().st_size) / max(1, sum(rows[groups.start :]))
        row = sum(rows[: groups.start])
        for group in groups:  # one by one: pyarrow fetches all the groups that it is given at once
            asked = {"batch_size": batch_rows(file.metadata.row_group(group), column), "columns": [column]}
            for batch in file.iter_batches(row_groups=[group], use_threads=False, **asked):
                for text in strings_of(batch.column(0), path, row):
                    yield Document(text, share)
                row += len(batch)


def batch_rows(group: Any, column: str) -> int:
    """Rows of a row group that are about `BATCH_BYTES`."""
    columns = map(group.column, range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in columns if chunk.path_in_schema == column)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, size)))


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; damage is a UserError."""
    pa, pq = import_pyarrow(path)
    path.stat()  # an OSError from here on is pyarrow's word for damage
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not a parquet file ({str(error).splitlines()[0]})") from None


def check_column(schema: Any, column: str, path: Path) -> None:
    pa, _ = import_pyarrow(path)
    if schema.names.count(column) != 1:
        how = "more than one column" if column in schema.names else "no column"
        raise UserError(f"{path} has {how} {column!r}, there are {', '.join(schema.names)}; name it with --text-column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{path}: column {column!r} is not text but {kind}; name another with --text-column")


def strings_of(values: Any, path: Path, first_row: int) -> Sequence[str]:
    try:
        return [text or "" for text in values.to_pylist()]
    except UnicodeDecodeError:
        raise UserError(f"{path}, rows from {first_row}: the text is not valid UTF-8; convert the file") from None


def import_pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; install it with: pip install 'regpt[data]'") from None
    return pyarrow, pyarrow.parquet


def import_zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {path} needs zstandard; install it with: pip install 'regpt[data]'") from None
    return zstandard
