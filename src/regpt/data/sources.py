"""Files of text → documents, one at a time and always in the same order.

`.txt` and `.md` hold one document a file, `.jsonl` (also `.gz`, `.zst`) one a line, `.parquet` one a row. The text is
decoded from UTF-8 and not changed in any other way. What a user gives is read in the order given; the files of a folder
or glob in the order of their names.
"""

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from regpt.errors import UserError, nearest

TEXT, JSONL, PARQUET = (".txt", ".md"), (".jsonl", ".jsonl.gz", ".jsonl.zst"), (".parquet",)
SUFFIXES = (*TEXT, *JSONL, *PARQUET)
ALLOWED = ", ".join(SUFFIXES)
NAMED = ("pydocs", "tinyshakespeare")  # sets that data/named.py opens; ./pydocs is a folder
BATCH_ROWS = 256  # rows of a row group that are Python strings at a time


class Document(NamedTuple):
    """A text, and the bytes of its file that reading it consumed (for progress: they sum to its size)."""

    text: str
    source_bytes: float


@dataclass(frozen=True)
class SourceFile:
    """One file that the user's `source` led to; `file` is its path inside that folder, or the name as it was given."""

    source: str
    file: str
    path: Path

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def record(self) -> dict[str, Any]:
        """Where the text came from, for the manifest: never an absolute path that the user did not type."""
        try:
            with self.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        return {"source": self.source, "file": self.file, "bytes": self.bytes, "sha256": digest}

    def documents(self, text_column: str) -> Iterator[Document]:
        return read_documents(self.path, text_column)


def find_files(source: str) -> list[SourceFile]:
    """The files of one SOURCE: a file, a folder (searched recursively) or a glob, in sorted order.

    Raises:
        UserError: nothing there, nothing readable there, or a file of a kind that is not read.
    """
    path = Path(source)
    if path.is_dir():
        inside = sorted(
            (file for file in path.rglob("*") if file.is_file()), key=lambda file: file.relative_to(path).parts
        )
        found = [SourceFile(source, file.relative_to(path).as_posix(), file) for file in inside if suffix_of(file)]
        if not found:
            raise UserError(f"folder {source!r} holds no readable file; allowed are {ALLOWED}")
        return found
    matches = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(source, recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise UserError(
            f"no file matches {source!r}{nearest(source, NAMED)}; "
            f"give files, folders or globs of {ALLOWED}, or a named set ({', '.join(NAMED)})"
        )
    for file in files:
        if not suffix_of(file):
            raise UserError(f"{str(file)!r} is of a kind that is not read; allowed are {ALLOWED}")
    return [SourceFile(source, str(file), file) for file in files]


def suffix_of(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_documents(path: Path, text_column: str) -> Iterator[Document]:
    """The documents of `path` in order; an empty one, or a null, is an empty text.

    Raises:
        UserError: invalid UTF-8, a missing or non-text column, a damaged file; names file and line.
    """
    suffix = suffix_of(path)
    if suffix in TEXT:
        data = path.read_bytes()
        yield Document(decode(data, path), len(data))
    elif suffix in JSONL:
        yield from read_jsonl(path, text_column)
    else:
        yield from read_parquet(path, text_column)


def decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8; convert the file to UTF-8"
        ) from None


def read_jsonl(path: Path, column: str) -> Iterator[Document]:
    with path.open("rb") as raw, decompressed(raw, path) as lines:
        before = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = text_of_line(decode(line, path, number), column, f"{path}, line {number}")
                before, consumed = raw.tell(), raw.tell() - before  # of the file itself, compressed or not
                yield Document(text, consumed)


def text_of_line(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
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
    if suffix_of(path) == ".jsonl":
        yield raw
    elif suffix_of(path) == ".jsonl.gz":
        try:
            with gzip.open(raw) as stream:
                yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: it does not decompress ({error})") from None
    else:
        zstandard = import_zstandard(path)
        try:
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                yield io.BufferedReader(stream)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged: it does not decompress ({error})") from None


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    pa, pq = import_pyarrow(path)
    try:
        with pq.ParquetFile(path) as file:
            check_column(file.schema_arrow, column, path, pa)
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                for text in strings_of(batch.column(0), path, row):
                    yield Document(text, share)
                row += len(batch)
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged or not a parquet file ({str(error).splitlines()[0]})") from None


def check_column(schema: Any, column: str, path: Path, pa: Any) -> None:
    if column not in schema.names:
        raise UserError(
            f"{path} has no column {column!r}, there are {', '.join(schema.names)}; name it with --text-column"
        )
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
