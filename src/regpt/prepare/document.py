"""A document of a file, and a part of a file: what readers of every format give and take."""

from collections.abc import Callable
from typing import Any, NamedTuple

from regpt.compression import Unreadable


def not_utf8(where: str, byte: int) -> Unreadable:
    return Unreadable(
        f"{where}: byte 0x{byte:02x} is not valid UTF-8; convert the file to UTF-8, or name its --encoding", "not_utf8"
    )


class Row(NamedTuple):
    """What a document is made of.

    Attributes:
        value: text, an object with named columns, or why there is neither.
        source_bytes: of the file that reading it consumed.
        where: the place for messages.
    """

    value: Any
    source_bytes: float
    where: Callable[[], str]


class Document(NamedTuple):
    """A text, and the bytes of its file that reading it consumed (for progress: they sum to about its size).

    `error` says why there is no text, where such documents are skipped.
    """

    text: str
    source_bytes: float
    error: Unreadable | None = None


class Part(NamedTuple):
    """Part of a file: row groups of .parquet, bytes of .jsonl (the lines that start there), 0 to 1 for a whole file.

    `bytes` is its share of the file's size; the shares sum to it.
    """

    start: int
    stop: int
    bytes: int
