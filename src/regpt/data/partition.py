"""Sources → partitions: the units in which text is encoded, by whichever process, and found again after a stop.

How the sources are divided is a function of them alone, and the partitions in their order are the text. The bytes of
the shards do not depend on where the borders lie.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regpt.data.formats import Part
from regpt.data.sources import Source, SourceFile

Split = Literal["train", "val"]
# Bytes of source files. Upwards a kill loses what the workers had in hand; downwards files are opened more often. A
# parquet file of English text holds about 3.5 times its size.
MIN_BYTES, MAX_BYTES = 1 << 20, 32 << 20
PER_CORPUS = 64  # partitions of a small corpus, so that 16 cores end at about the same time


@dataclass(frozen=True)
class Reading:
    """A part of one source; `first` marks the part that also makes the source's record."""

    source: Source
    part: Part
    split: Split
    first: bool

    def identity(self) -> list[Any]:
        """What changes when the text may have changed."""
        return [self.source.source, self.source.file, *self.part, self.split, self.first, *fingerprint(self.source)]

    def to_dict(self) -> dict[str, Any]:
        source = self.source
        assert isinstance(source, SourceFile)
        named = {"source": source.source, "file": source.file, "path": str(source.path)}
        known = {"url": source.url, "sha256": source.sha256}
        return {**named, **known, "part": list(self.part), "split": self.split, "first": self.first}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Reading":
        source = SourceFile(given["source"], given["file"], Path(given["path"]), given["url"], given["sha256"])
        return cls(source, Part(*given["part"]), given["split"], given["first"])


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

    @property
    def in_files(self) -> bool:
        """Can another process read it? Sets made in memory are encoded where they are."""
        return all(isinstance(reading.source, SourceFile) for reading in self.readings)

    def to_json(self) -> str:
        readings = [reading.to_dict() for reading in self.readings]
        return json.dumps({"index": self.index, "key": self.key, "readings": readings})

    @classmethod
    def from_json(cls, text: str) -> "Partition":
        given = json.loads(text)
        return cls(given["index"], tuple(map(Reading.from_dict, given["readings"])), given["key"])


def fingerprint(source: Source) -> list[Any]:
    if isinstance(source, SourceFile):
        stat = source.path.stat()
        return [stat.st_size, stat.st_mtime_ns]
    return [source.record()]


def target_bytes(total: int) -> int:
    return min(MAX_BYTES, max(MIN_BYTES, total // PER_CORPUS))


def partitions(sources: Iterable[tuple[Source, Split]], target: int, settings_key: str) -> Iterator[Partition]:
    """Parts of sources on this machine, small ones put together until they reach `target` bytes."""
    index, group, size = 0, [], 0
    for source, split in sources:
        for i, part in enumerate(source.parts(target)):
            if group and (size >= target or group[-1].split != split):
                yield partition(index, group, settings_key)
                index, group, size = index + 1, [], 0
            group.append(Reading(source, part, split, i == 0))
            size += part.bytes
    if group:
        yield partition(index, group, settings_key)


def partition(index: int, readings: list[Reading], settings_key: str) -> Partition:
    content = json.dumps([settings_key, [reading.identity() for reading in readings]], default=str)
    return Partition(index, tuple(readings), hashlib.sha256(content.encode()).hexdigest())
