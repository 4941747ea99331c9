"""A document of a file, and a part of a file: what readers of every format give and take."""

from typing import NamedTuple


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
