"""Encoded partitions → shards, in order. Their files stay in the work folder until the last shard is finished: a later
attempt writes the shards anew, from what is encoded.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regpt.data.manifest import SPLITS, WORK, Manifest, Shard
from regpt.files import PARTIAL, finish_file, write_bytes, write_text
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.dedup import Dedup
from regpt.prepare.partition import DOCUMENT, Partition, Split, load_summary
from regpt.prepare.records import Records
from regpt.prepare.settings import Settings
from regpt.text.open import NAMED
from regpt.text.tokenizer import Tokenizer

BLOCK_TOKENS = 4 << 20  # copied at a time
OURS = re.compile(r"(((train|val)-\d{5,}\.(bin|idx|parts))|tokenizer\.json|removed\.jsonl|manifest\.json)(\.partial)?")


class Assembly:
    """Writes the shards of `out` from the partitions in its work folder; `add` takes them in order."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        shard_tokens: int,
        evaluations: Evaluations | None,
    ) -> None:
        self._work = out / WORK
        self._dtype = np.dtype(settings.dtype).newbyteorder("<")
        remove_leftovers(out)
        self._writers = {split: ShardWriter(out, split, settings.dtype, shard_tokens) for split in SPLITS}
        self._dedup = Dedup(self._work, settings.dedup)
        self.records = Records(self._work / "removed.partial", evaluations)

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in self._writers.values():
            writer.__exit__(*error)
        self._dedup.close()
        self.records.close()

    def add(self, partition: Partition) -> None:
        """Append `partition`, the next one."""
        found = load_summary(self._work, partition.name)
        tables = {
            split: np.fromfile(self._work / f"{partition.name}.{split}.docs", dtype=DOCUMENT)
            for split in found["splits"]
        }
        kept, repeats = self._dedup.choose(partition.name, self.records.rows, tables)
        self.records.add(partition, found, tables, kept, repeats)
        for split, table in tables.items():
            for tokens, starts in self._blocks(f"{partition.name}.{split}.bin", table["tokens"], kept[split]):
                self._writers[split].write(tokens, starts)

    def finish(self) -> list[Shard]:
        """End the last shards; all of them, train before val."""
        for writer in self._writers.values():
            writer.finish()
        return [shard for split in SPLITS for shard in self._writers[split].shards]

    def _blocks(self, name: str, lengths: np.ndarray, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The kept documents' tokens, some at a time, and where documents start in them."""
        ends = np.cumsum(lengths)
        starts = np.cumsum(lengths[kept]) - lengths[kept]  # in the kept tokens
        at = 0
        for first, last in runs(kept):
            end = int(ends[last])
            for begin in range(int(ends[first] - lengths[first]), end, BLOCK_TOKENS):
                n = min(BLOCK_TOKENS, end - begin)
                offset = begin * self._dtype.itemsize
                tokens = np.fromfile(self._work / name, dtype=self._dtype, count=n, offset=offset)
                low, high = np.searchsorted(starts, (at, at + n))
                yield tokens, starts[low:high] - at
                at += n


def runs(kept: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of True in `kept` (n,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2])]


class ShardWriter:
    """Writes one split as shards of at most `shard_tokens` tokens; a document may continue in the next shard.

    `shards` describes the files that are finished; `finish` ends the last one. Used as a context manager, it closes the
    open file when something fails.
    """

    def __init__(self, folder: Path, split: Literal["train", "val"], dtype: str, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._shard_tokens = folder, shard_tokens
        self._split: Split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = None
        self._begin()

    def write(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Append `tokens` (n,); documents start at the positions `starts` (d,) in them, ascending."""
        while len(tokens):
            if self._tokens == self._shard_tokens:
                self._end(continues=not (len(starts) and starts[0] == 0))
            part, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            here, starts = np.split(starts, [np.searchsorted(starts, len(part))])
            self._starts.append(here + self._tokens)
            starts = starts - len(part)
            self._append(part.astype(self._dtype, copy=False).view(np.uint8).data)
            self._tokens += len(part)

    def finish(self) -> None:
        """End the last shard; a split without tokens has none."""
        if self._file is not None:
            self._end(continues=False)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again
                self._file.close()

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
        self._file.write(data)
        self._digest.update(data)

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self.shards):05d}.bin"
        self._tokens, self._starts, self._digest = 0, [], hashlib.sha256()

    def _end(self, continues: bool) -> None:
        assert self._file is not None
        finish_file(self._file, self._folder / self._name)
        self._file = None
        starts = np.concatenate(self._starts).astype("<i8")
        index = starts.tobytes()
        shard = Shard(
            file=self._name,
            split=self._split,
            tokens=self._tokens,
            documents=len(starts),
            sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            continues=continues,
        )
        write_bytes(self._folder / shard.idx_file, index)
        self.shards.append(shard)
        self._begin()


def finish_folder(
    folder: Path, tokenizer: Tokenizer, dtype: Literal["uint16", "uint32"], shards: Sequence[Shard], **facts: Any
) -> Manifest:
    """Write the tokenizer, unless it has a name, and the manifest of finished shards; `facts` are its other fields."""
    if tokenizer.name not in NAMED:
        write_text(folder / "tokenizer.json", tokenizer.to_json())
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot,
        dtype=dtype,
        shards=tuple(shards),
        **facts,
    )
    write_text(folder / "manifest.json", manifest.to_json())  # last, when the shards are on the disk
    return manifest


def remove_leftovers(folder: Path) -> None:
    """Delete the files of an interrupted preparation in `folder`, the manifest before the shards."""
    for path in sorted(folder.iterdir()):
        if OURS.fullmatch(path.name):
            path.unlink()
