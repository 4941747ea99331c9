"""Parquet files → documents, a batch of one row group's text column at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regpt.data.document import Document, Part
from regpt.errors import UserError

PARQUET_BUFFER = 1 << 20  # of a column that is read at a time, instead of its whole row group
BATCH_BYTES, BATCH_ROWS = 1 << 20, 1024  # of a row group that are Python strings at a time, at most


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
