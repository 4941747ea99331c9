"""Encoded partitions → shards, in order; what survives a stop here, and what is given up as it is used.

Whenever a shard is finished, `shards.json` in the work folder says so, and the tokens that are in finished shards are
deleted. An attempt that finds it begins after the last finished shard. The tables of documents stay until the end, so
that it can work out anew which documents repeat earlier ones.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regpt.data.manifest import SPLITS, Shard
from regpt.files import write_json
from regpt.prepare.audit import Audit
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.dedup import Dedup
from regpt.prepare.partition import Partition, Split
from regpt.prepare.parts import DOCUMENT, RESTART, is_whole, load_summary
from regpt.prepare.settings import Settings
from regpt.prepare.summary import Summary
from regpt.prepare.write import ShardWriter, remove_leftovers
from regpt.structured import read_json

STATE = "shards.json"
BLOCK_TOKENS = 4 << 20  # copied at a time


@dataclass(frozen=True)
class State:
    """What finished shards hold.

    Attributes:
        shards: the finished ones of each split.
        partitions: how many partitions have been read, in order; parts of the last may be missing in the shards.
        keys: hash of their keys.
        used: for each split the number of partitions of which it has everything; their tokens are no longer there.
    """

    shards: dict[str, list[dict[str, Any]]]
    partitions: int
    keys: str
    used: dict[str, int]


NOTHING = State({split: [] for split in SPLITS}, 0, hashlib.sha256().hexdigest(), dict.fromkeys(SPLITS, 0))


def load_state(work: Path, out: Path, shard_tokens: int, width: int) -> State:
    """The state of an earlier attempt, or `NOTHING` when there is none or a shard of it is not there as it was."""
    try:
        state = State(**read_json(work / STATE, RESTART))
        shards = [Shard(**shard) for split in SPLITS for shard in state.shards[split]]
    except (OSError, ValueError, KeyError, TypeError):
        return NOTHING
    whole = all(
        shard.tokens == shard_tokens
        and has_size(out / shard.file, shard.tokens * width)
        and has_size(out / shard.idx_file, shard.documents * 8)
        for shard in shards
    )
    return state if whole else NOTHING


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def hash_keys(partitions: Sequence[Partition]) -> str:
    return hashlib.sha256("".join(partition.key for partition in partitions).encode()).hexdigest()


class Assembly:
    """Writes the shards of `out` from the partitions in `work`; `add` takes them in order."""

    def __init__(
        self,
        out: Path,
        work: Path,
        settings: Settings,
        shard_tokens: int,
        state: State,
        audit: Audit | None = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        self._out, self._work, self._state = out, work, state
        self._dtype = np.dtype(settings.dtype).newbyteorder("<")
        found = {split: [Shard(**shard) for shard in state.shards[split]] for split in SPLITS}
        remove_leftovers(out, keep=[name for shards in found.values() for s in shards for name in (s.file, s.idx_file)])
        self._writers = {split: ShardWriter(out, split, settings.dtype, shard_tokens, found[split]) for split in SPLITS}
        self._in_shards = {split: sum(shard.tokens for shard in found[split]) for split in SPLITS}
        self._given = dict.fromkeys(SPLITS, 0)  # tokens of the partitions so far
        self._waiting: dict[str, deque[tuple[int, str, int]]] = {split: deque() for split in SPLITS}
        self._keys = hashlib.sha256()
        self._dedup = Dedup(work, settings.dedup)
        self._audit = audit
        self._index = 0
        self.summary = Summary(work / "removed.partial", evaluations)

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in self._writers.values():
            writer.__exit__(*error)
        self._dedup.close()
        self.summary.close()

    def is_ready(self, partition: Partition) -> bool:
        """Is the work of an earlier attempt on `partition` there and whole?"""
        try:
            found = load_summary(self._work, partition.name)
            signatures = found["signatures"]
            if signatures and not is_whole(self._work / f"{partition.name}.sig", signatures):
                return False
            return found["key"] == partition.key and all(
                is_whole(self._work / f"{partition.name}.{split}{suffix}", check)
                for split, content in found["splits"].items()
                for suffix, check in content["files"].items()
                if suffix != ".bin" or partition.index >= self._state.used[split]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def add(self, partition: Partition) -> None:
        """Append `partition`, the next one.

        Raises:
            Unusable: its tokens are not the tokenizer's.
        """
        found = load_summary(self._work, partition.name)
        tables = {
            split: np.fromfile(self._work / f"{partition.name}.{split}.docs", dtype=DOCUMENT)
            for split in found["splits"]
        }
        if self._audit:
            self._audit.check(partition.name, tables)
        kept, repeats = self._dedup.choose(partition.name, self.summary.rows, tables)
        self.summary.add(partition, found, tables, kept, repeats)
        before = self._finished()
        for split, table in tables.items():
            self._copy(partition, split, table, kept[split])
        self._keys.update(partition.key.encode())
        self._index += 1
        if self._finished() > before:
            self._save()

    def finish(self) -> list[Shard]:
        """End the last shards; all of them, train before val."""
        for writer in self._writers.values():
            writer.finish()
        return [shard for split in SPLITS for shard in self._writers[split].shards]

    def _copy(self, partition: Partition, split: Split, table: np.ndarray, kept: np.ndarray) -> None:
        """Hand the kept documents to the writer, but for what finished shards hold."""
        done = min(max(0, self._in_shards[split] - self._given[split]), int(table["tokens"][kept].sum()))
        for tokens, starts in self._blocks(partition, split, table["tokens"], kept, done):
            self._writers[split].write(tokens, starts)
        self._given[split] += int(table["tokens"][kept].sum())
        self._waiting[split].append((partition.index, partition.name, self._given[split]))

    def _blocks(
        self, partition: Partition, split: Split, lengths: np.ndarray, kept: np.ndarray, done: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Kept tokens after the first `done`, and where documents start in them."""
        ends = np.cumsum(lengths)
        starts = np.cumsum(lengths[kept]) - lengths[kept]  # in the kept tokens
        at = 0
        for first, last in runs(kept):
            begin, end = int(ends[first] - lengths[first]), int(ends[last])
            skipped = min(max(0, done - at), end - begin)
            at, begin = at + skipped, begin + skipped
            while begin < end:
                n = min(BLOCK_TOKENS, end - begin)
                path = self._work / f"{partition.name}.{split}.bin"
                tokens = np.fromfile(path, dtype=self._dtype, count=n, offset=begin * self._dtype.itemsize)
                low, high = np.searchsorted(starts, (at, at + n))
                yield tokens, starts[low:high] - at
                at, begin = at + n, begin + n

    def _finished(self) -> int:
        return sum(len(writer.shards) for writer in self._writers.values())

    def _save(self) -> None:
        """Say what the finished shards hold, then delete the tokens that are in them."""
        shards = {split: [asdict(shard) for shard in self._writers[split].shards] for split in SPLITS}
        self._in_shards = {split: sum(shard["tokens"] for shard in shards[split]) for split in SPLITS}
        used, waiting = dict(self._state.used), []
        for split, queue in self._waiting.items():
            while queue and queue[0][2] <= self._in_shards[split]:
                index, name, _ = queue.popleft()
                used[split] = index + 1
                waiting.append(self._work / f"{name}.{split}.bin")
        self._state = State(shards, self._index, self._keys.hexdigest(), used)
        write_json(self._work / STATE, asdict(self._state))
        for path in waiting:
            path.unlink(missing_ok=True)


def runs(kept: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of True in `kept` (n,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2])]
