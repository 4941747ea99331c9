"""Files of text → documents, one at a time and always in the same order.

`.txt` and `.md` hold one document a file, `.jsonl` (also `.gz`, `.zst`) one a line, `.parquet` one a row. The text is
decoded from UTF-8 and not changed in any other way.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from regpt.data.compression import decompressed
from regpt.data.document import Document, Part
from regpt.data.parquet import read_parquet, row_groups
from regpt.errors import UserError

TEXT, JSONL, PARQUET = (".txt", ".md"), (".jsonl", ".jsonl.gz", ".jsonl.zst"), (".parquet",)
SUFFIXES = (*TEXT, *JSONL, *PARQUET)
ALLOWED = ", ".join(SUFFIXES)
SNIFFED = 8000  # bytes in which git, too, looks for a zero to tell binary files from text


def suffix_of(name: str | Path) -> str | None:
    """The ending by which a file of this name is read; None for other kinds."""
    return next((suffix for suffix in SUFFIXES if str(name).lower().endswith(suffix)), None)


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
