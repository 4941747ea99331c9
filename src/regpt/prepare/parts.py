"""The files of encoded partitions: tokens, a table of documents, and what a later attempt checks them by.

They are scratch: not forced to the disk, but checked by size and checksum before another process builds on them. They
have their names when they are whole.
"""

import contextlib
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from regpt.prepare.dedup import KEY, SIGNATURE
from regpt.prepare.partition import Split
from regpt.prepare.settings import Settings
from regpt.structured import read_json

RESTART = "add --restart to prepare from the start"
# `number` counts all documents of the partition, those left out too; `key` begins the SHA-256 of the text.
DOCUMENT = np.dtype([("number", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("key", KEY)])


@dataclass
class Counts:
    """Of one partition so far; `source_bytes` are those of the files."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    source_bytes: float = 0.0

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens
        self.source_bytes += other.source_bytes


class Piece(NamedTuple):
    """A document, or a part of a long one; `row` is the document's in the table, or None for a later part."""

    text: str
    split: Split
    row: tuple[int, int, bytes] | None
    signature: np.ndarray | None
    source_bytes: float


class SplitFiles:
    """The files of one partition's split: `.bin` (tokens) and `.docs` (`DOCUMENT` rows)."""

    def __init__(self, work: Path, stem: str, settings: Settings) -> None:
        self._files = {suffix: Checked(work / (stem + suffix)) for suffix in (".bin", ".docs")}
        self._eot = np.array([settings.eot], dtype=np.uint32)
        self._dtype = np.dtype(settings.dtype).newbyteorder("<")
        self._open: tuple[int, int, int, bytes] | None = None  # the document that may go on in the next batch
        self._total = Counts()

    def write(self, pieces: Sequence[tuple[Piece, np.ndarray]]) -> Counts:
        """Append pieces with their tokens, in the order of the text; returns what was added."""
        added, tokens, rows = Counts(), [], []
        for piece, ids in pieces:
            length = len(ids)
            if piece.row is not None:
                number, text_bytes, key = piece.row
                rows += [self._open] if self._open else []
                tokens.append(self._eot)
                length += 1
                self._open = (number, 0, text_bytes, key)
                added.documents += 1
                added.text_bytes += text_bytes
            assert self._open
            number, before, text_bytes, key = self._open
            self._open = (number, before + length, text_bytes, key)
            tokens.append(ids)
            added.tokens += length
            added.source_bytes += piece.source_bytes
        self._files[".bin"].write(np.concatenate(tokens, dtype=self._dtype, casting="unsafe"))  # n_vocab fits
        self._files[".docs"].write(np.array(rows, dtype=DOCUMENT))
        self._total.add(added)
        return added

    def finish(self) -> dict[str, Any]:
        """Give the files their names; their sizes and checksums, and the counts."""
        self._files[".docs"].write(np.array([self._open] if self._open else [], dtype=DOCUMENT))
        checks = {suffix: file.finish() for suffix, file in self._files.items()}
        total = self._total
        return {"documents": total.documents, "tokens": total.tokens, "text_bytes": total.text_bytes, "files": checks}

    def __enter__(self) -> "SplitFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()


class SignatureFile:
    """The signatures of one partition's documents, in their order: `SIGNATURE`s."""

    def __init__(self, path: Path) -> None:
        self._file = Checked(path)

    def write(self, pieces: Sequence[Piece]) -> None:
        rows = [(piece.row[0], piece.signature) for piece in pieces if piece.row is not None]
        self._file.write(np.array(rows, dtype=SIGNATURE))

    def finish(self) -> list[int]:
        return self._file.finish()

    def __enter__(self) -> "SignatureFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Checked:
    """A file that has its name when it is whole, and a checksum that says whether it still is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Two processes may write the same one: a worker whose task was given to another for dead.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        self._file: BinaryIO = self._partial.open("wb")
        self._size, self._crc = 0, 0

    def write(self, data: bytes | np.ndarray) -> None:
        view = data if isinstance(data, bytes) else data.view(np.uint8).data
        self._file.write(view)
        self._size += len(view)
        self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> list[int]:
        self._file.close()
        os.replace(self._partial, self._path)
        return [self._size, self._crc]

    def close(self) -> None:
        """Without a name if it was not finished."""
        with contextlib.suppress(OSError):  # a full disk says so again
            self._file.close()
        self._partial.unlink(missing_ok=True)


def place(path: Path, data: bytes) -> None:
    file = Checked(path)
    try:
        file.write(data)
        file.finish()
    finally:
        file.close()


def is_whole(path: Path, check: Sequence[int]) -> bool:
    """Does `path` have the size and checksum of `check`?"""
    if not path.is_file() or path.stat().st_size != check[0]:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc == check[1]


def load_summary(work: Path, name: str) -> dict[str, Any]:
    """What `<name>.json` says about a partition.

    Raises:
        UserError: no such file, or something else in it.
    """
    return read_json(work / f"{name}.json", RESTART)
