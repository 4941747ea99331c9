"""Parquet files → rows, a batch of one row group's text column at a time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from regpt.compression import MAX_ROW_BYTES, too_long
from regpt.errors import UserError, import_extra
from regpt.prepare.documents import HOW, Columns, FilePart, Row, Unreadable, missing, names_in, pick

PARQUET_BUFFER = 1 << 20  # of a column that is read at a time, instead of its whole row group
# Encodings by which rows share bytes, so that a column may be far larger than its chunks: a dictionary can stay one in
# memory, where a column is read alone; otherwise few rows are decoded at a time.
DICTIONARY, PREFIXES, SHARED_ROWS = {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}, {"DELTA_BYTE_ARRAY"}, 16
BATCH_BYTES, BATCH_ROWS = 1 << 20, 1024  # of a row group that are Python strings at a time, at most


def row_groups(path: Path, target_bytes: int) -> list[FilePart]:
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
            parts.append(FilePart(start, i, position - before))
            start, before = i, position
    return parts or [FilePart(0, 0, size)]


def read_parquet(path: Path, columns: Columns | None, part: FilePart | None = None) -> Iterator[Row]:
    """The rows of `path`, or of a part: all columns, or those that `columns` needs; of a single one the text itself."""
    with opened_parquet(path) as file:
        names = check_columns(file, columns, path) if columns else None
        alone = columns is not None and len(columns.names) == 1 and columns.names[0] in file.schema_arrow.names
        packed = {one for chunk in chunks_of(file.metadata, names) for one in chunk.encodings}
    whole = alone and not packed & PREFIXES  # a dictionary stays one
    with opened_parquet(path, names if whole and packed & DICTIONARY else None) as file:
        groups = range(part.start, part.stop) if part else range(file.metadata.num_row_groups)
        rows = [file.metadata.row_group(i).num_rows for i in range(groups.stop)]
        share = (part.bytes if part else path.stat().st_size) / max(1, sum(rows[groups.start :]))
        row = sum(rows[: groups.start])
        for group in groups:
            refuse_long_rows(file.metadata, group, names, path)
        for group in groups:  # one by one: pyarrow fetches all the groups that it is given at once
            few = packed & PREFIXES or (packed & DICTIONARY and not whole)
            size = SHARED_ROWS if few else batch_rows(file.metadata, group, names)
            for batch in file.iter_batches(row_groups=[group], use_threads=False, batch_size=size, columns=names):
                values = batch.column(0) if alone else batch.to_struct_array()
                for number, value in enumerate(values_of(values, path, row), start=row):
                    yield Row(value, share, partial("{}, row {}".format, path, number))
                row += len(batch)


def chunks_of(metadata: Any, names: Sequence[str] | None, groups: Iterable[int] | None = None) -> Iterator[Any]:
    """Metadata of the columns `names` (None: all) in some row groups (None: all)."""
    asked = None if names is None else tuple(name + "." for name in names)
    for group in map(metadata.row_group, range(metadata.num_row_groups) if groups is None else groups):
        for chunk in map(group.column, range(group.num_columns)):
            if asked is None or (chunk.path_in_schema + ".").startswith(asked):
                yield chunk


def refuse_long_rows(metadata: Any, group: int, names: Sequence[str] | None, path: Path) -> None:
    """Raise a UserError for a row group of which some row is longer than is read, as they are on average: before one
    page of up to 2 GiB, which pyarrow unpacks whole, takes memory. Text in a dictionary may be longer than its chunk.
    """
    size = sum(chunk.total_uncompressed_size for chunk in chunks_of(metadata, names, [group]))
    if size > max(1, metadata.row_group(group).num_rows) * MAX_ROW_BYTES:
        raise too_long(f"{path}, row group {group}")


def batch_rows(metadata: Any, group: int, names: Sequence[str] | None) -> int:
    """Rows of a row group whose columns `names` are about `BATCH_BYTES`."""
    size = sum(chunk.total_uncompressed_size for chunk in chunks_of(metadata, names, [group]))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.row_group(group).num_rows // max(1, size)))


@contextmanager
def opened_parquet(path: Path, dictionaries: Sequence[str] | None = None) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that keeps the dictionaries of the columns given; damage is a UserError."""
    pa, pq = import_pyarrow(path)
    path.stat()  # an OSError from here on is pyarrow's word for damage
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER, read_dictionary=dictionaries) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        said = f"{path} is damaged or not a parquet file ({str(error).splitlines()[0]})"
        raise Unreadable(said, "damaged") from None


def check_columns(file: Any, columns: Columns, path: Path) -> list[str]:
    """The columns of the file to read for those that are asked for, which may be inside them.

    Raises:
        UserError: one is not there, is there twice, or is not text.
    """
    schema, types, read = file.schema_arrow, import_pyarrow(path)[0].types, []
    example = {field.name: type_inside(field.type, types) for field in schema}
    for name in columns.names:
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has more than one column {name!r}, there are {', '.join(schema.names)}; {HOW}")
        try:
            kind = pick(example, name)
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{path} has {missing(name, names_in(example))}") from None
        if columns.alone and not holds_text(kind, types):
            kind = schema.field(name).type if name in schema.names else kind
            raise UserError(f"{path}: column {name!r} is not text but {kind}; name another with --text-column")
        whole = [name] if name in schema.names else [one for one in schema.names if name.startswith(f"{one}.")]
        read += [one for one in whole if one not in read]
    return read


class Elements(list[Any]):
    """A list whose elements are all alike, however many it has."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(0)


def type_inside(kind: Any, types: Any) -> Any:
    """An example of a value of the type `kind`, as rows have it, with types in the places of texts and numbers."""
    if types.is_struct(kind):
        return {field.name: type_inside(field.type, types) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return Elements([type_inside(kind.value_type, types)])
    return kind


def holds_text(kind: Any, types: Any) -> bool:
    """Whether values are text, or all of them null."""
    if isinstance(kind, dict | list):
        return False
    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(check(kind) for check in checks)


def values_of(values: Any, path: Path, first_row: int) -> Iterator[Any]:
    """Python's values, made one after another, as rows may share a text; where it is not UTF-8, an `Unreadable`.

    Raises:
        UserError: a row of more than `MAX_ROW_BYTES`.
    """
    some_long = values.nbytes > MAX_ROW_BYTES
    for row, value in enumerate(values, start=first_row):
        if some_long and bytes_of(values, row - first_row) > MAX_ROW_BYTES:
            raise too_long(f"{path}, row {row}")
        try:
            found = value.as_py()
            yield "" if found is None else found
        except UnicodeDecodeError:
            yield Unreadable(f"{path}, row {row}: the text is not valid UTF-8; convert the file", "not_utf8")


def bytes_of(values: Any, number: int) -> int:
    """Bytes of one of the values, without a copy of it."""
    if hasattr(values, "dictionary"):
        place = values.indices[number].as_py()
        return 0 if place is None else values.dictionary.slice(place, 1).nbytes
    return values.slice(number, 1).nbytes


def import_pyarrow(path: Path) -> tuple[Any, Any]:
    purpose = f"reading {path} needs pyarrow"
    return import_extra("pyarrow", purpose, "data"), import_extra("pyarrow.parquet", purpose, "data")
