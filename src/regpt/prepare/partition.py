"""Sources → partitions: the units in which text is encoded, by whichever process, and found again after a stop.

How the sources are divided is a function of them alone, and the partitions in their order are the text. The bytes of
the shards do not depend on the borders.

The files of an encoded partition are scratch: not forced to the disk, but checked by size and checksum before another
process builds on them.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regpt.errors import UserError
from regpt.prepare.dedup import KEY
from regpt.prepare.documents import FilePart
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.prepare.sources import LocalSource, SourceFile
from regpt.structured import read_json

Split = Literal["train", "val"]
# Bytes of source files. Upwards a kill loses what the workers had in hand; downwards files are opened more often. A
# parquet file of English text holds about 3.5 times its size.
MIN_BYTES, MAX_BYTES = 1 << 20, 32 << 20
PER_CORPUS = 64  # partitions of a small corpus, so that 16 cores end at about the same time
RESTART = "add --restart to prepare from the start"
# `number` counts all documents of the partition, those left out too; `key` begins the SHA-256 of the text.
DOCUMENT = np.dtype([("number", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("key", KEY)])


@dataclass(frozen=True)
class Reading:
    """A part of one source.

    Attributes:
        source: on this machine.
        part: which part of it.
        split: where its documents belong unless their own hash decides.
        first: also make the source's record.
        stamp: what changes when the source does: size and time of a file, the hash of a set in memory.
    """

    source: LocalSource
    part: FilePart
    split: Split
    first: bool
    stamp: str

    def identity(self) -> list[Any]:
        """What changes when the text may have changed."""
        return [self.source.source, self.source.file, *self.part, self.split, self.first, self.stamp]

    def check_unchanged(self) -> None:
        """Raise a UserError when the source changed since the work was divided."""
        if stamp_of(self.source) != self.stamp:
            raise UserError(f"{self.source.file} changed while it was read; run the same command again")


@dataclass(frozen=True)
class Partition:
    """Neighbouring parts that are encoded together; `key` changes with them and with the settings."""

    index: int
    readings: tuple[Reading, ...]
    key: str

    @property
    def name(self) -> str:
        return f"part-{self.index:06d}"

    @property
    def bytes(self) -> int:
        return sum(reading.part.bytes for reading in self.readings)


def stamp_of(source: LocalSource) -> str:
    if isinstance(source, SourceFile):
        stat = source.path.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    return source.record()["sha256"]


def target_bytes(total: int) -> int:
    return min(MAX_BYTES, max(MIN_BYTES, total // PER_CORPUS))


def partitions(
    sources: Iterable[tuple[LocalSource, Split]], target: int, settings_key: str, options: TextOptions = TEXT_OPTIONS
) -> Iterator[Partition]:
    """Parts of sources on this machine, small ones put together until they reach `target` bytes."""
    index, group, size = 0, [], 0
    for source, split in sources:
        stamp = stamp_of(source)
        for i, part in enumerate(source.parts(target, options)):
            if group and (size >= target or group[-1].split != split):
                yield partition(index, group, settings_key)
                index, group, size = index + 1, [], 0
            group.append(Reading(source, part, split, i == 0, stamp))
            size += part.bytes
    if group:
        yield partition(index, group, settings_key)


def partition(index: int, readings: list[Reading], settings_key: str) -> Partition:
    content = json.dumps([settings_key, [reading.identity() for reading in readings]])
    return Partition(index, tuple(readings), hashlib.sha256(content.encode()).hexdigest())


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


def total(parts: Iterable[Counts]) -> Counts:
    together = Counts()
    for counts in parts:
        together.add(counts)
    return together


def is_encoded(work: Path, partition: Partition) -> bool:
    """Whether the files of `partition` from an earlier attempt are there and whole."""
    try:
        found = load_summary(work, partition.name)
        return found["key"] == partition.key and all(
            is_whole(work / f"{partition.name}.{suffix}", check) for suffix, check in found["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_whole(path: Path, check: Sequence[int]) -> bool:
    """Whether `path` has the size and checksum of `check`."""
    if not path.is_file() or path.stat().st_size != check[0]:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc == check[1]


def load_summary(work: Path, name: str) -> dict[str, Any]:
    """The summary in `<name>.json`, which is written last.

    Raises:
        UserError: no such file, or something else in it.
    """
    return read_json(work / f"{name}.json", RESTART)
