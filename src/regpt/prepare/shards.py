"""Encoded partitions → shards, in order, and the state with which a later attempt continues.

Whenever a shard is finished, `shards.json` in the work folder lists it, and the tokens that are in finished shards are
deleted. An attempt that finds it begins after the last finished shard. The tables of documents stay until the end, so
that it can work out anew which documents repeat earlier ones.
"""

import contextlib
import hashlib
import itertools
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regpt.data.manifest import SPLITS, Shard
from regpt.files import PARTIAL, finish_file, write_bytes, write_json
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.dedup import Dedup
from regpt.prepare.partition import DOCUMENT, RESTART, Partition, Split, is_encoded, load_summary
from regpt.prepare.records import Records
from regpt.prepare.settings import Settings
from regpt.prepare.split import Unusable
from regpt.structured import read_json
from regpt.text.fast import PACKAGE
from regpt.text.tokenizer import Tokenizer

STATE = "shards.json"
BLOCK_TOKENS = 4 << 20  # copied at a time
EVERY = 1024  # documents, of which one is compared: a hundredth of one core's time at the speed of sixteen
MOST_TOKENS = 1 << 16  # of a compared document: a book would take seconds
OURS = re.compile(r"(((train|val)-\d{5,}\.(bin|idx))|tokenizer\.json|removed\.jsonl|manifest\.json)(\.partial)?")


@dataclass(frozen=True)
class State:
    """Content of the finished shards.

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


def load_state(
    work: Path, out: Path, shard_tokens: int, settings: Settings, plan: Iterator[Partition]
) -> tuple[State, Iterator[Partition]]:
    """The state of an earlier attempt, and `plan`; `NOTHING` without one, when a shard of it has changed, or when its
    partitions are no longer those of the plan."""
    width = np.dtype(settings.dtype).itemsize
    try:
        state = State(**read_json(work / STATE, RESTART))
        shards = [Shard(**shard) for split in SPLITS for shard in state.shards[split]]
    except (OSError, ValueError, KeyError, TypeError):
        return NOTHING, plan
    used = list(itertools.islice(plan, state.partitions))
    whole = all(
        shard.tokens == shard_tokens
        and has_size(out / shard.file, shard.tokens * width)
        and has_size(out / shard.idx_file, shard.documents * 8)
        for shard in shards
    )
    keys = hashlib.sha256("".join(partition.key for partition in used).encode()).hexdigest()
    return state if whole and keys == state.keys else NOTHING, itertools.chain(used, plan)


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class Assembly:
    """Writes the shards of `out` from the partitions in `work`; `add` takes them in order."""

    def __init__(
        self,
        out: Path,
        work: Path,
        settings: Settings,
        shard_tokens: int,
        state: State,
        check: "EncoderCheck | None",
        evaluations: Evaluations | None,
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
        self._check = check
        self._index = 0
        self.records = Records(work / "removed.partial", evaluations)

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in self._writers.values():
            writer.__exit__(*error)
        self._dedup.close()
        self.records.close()

    def is_ready(self, partition: Partition) -> bool:
        return is_encoded(self._work, partition, self._state.used)

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
        if self._check:
            self._check.compare(partition.name, tables)
        kept, repeats = self._dedup.choose(partition.name, self.records.rows, tables)
        self.records.add(partition, found, tables, kept, repeats)
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
        """Store the content of the finished shards, then delete the tokens that are in them."""
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


class ShardWriter:
    """Writes one split as shards of at most `shard_tokens` tokens; a document may continue in the next shard.

    `shards` describes the files that are finished, those of an earlier attempt first; `finish` ends the last one. Used
    as a context manager, it closes the open file when something fails. A thread hashes what is written.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        dtype: Literal["uint16", "uint32"],
        shard_tokens: int,
        shards: Sequence[Shard] = (),
    ) -> None:
        self.shards = list(shards)
        self._folder, self._shard_tokens = folder, shard_tokens
        self._split: Split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = None
        self._hasher = ThreadPoolExecutor(1)  # hashlib lets other threads run meanwhile
        self._hashed: deque[Future[None]] = deque()
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
        self._hasher.shutdown(cancel_futures=True)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again
                self._file.close()

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
        self._file.write(data)
        self._hashed.append(self._hasher.submit(self._digest.update, data))
        if len(self._hashed) > 2:  # bounds what is in memory
            self._hashed.popleft().result()

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self.shards):05d}.bin"
        self._tokens, self._starts, self._digest = 0, [], hashlib.sha256()

    def _end(self, continues: bool) -> None:
        assert self._file is not None
        finish_file(self._file, self._folder / self._name)
        self._file = None
        while self._hashed:
            self._hashed.popleft().result()
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


class EncoderCheck:
    """Compares a fast encoder's tokens with the tokenizer's, on one document in `EVERY`, whoever encoded it; takes the
    partitions in `work` in their order."""

    def __init__(self, work: Path, tokenizer: Tokenizer, dtype: str) -> None:
        self._work, self._tokenizer, self._dtype = work, tokenizer, np.dtype(dtype)
        self._seen = 0

    def compare(self, name: str, tables: Mapping[str, np.ndarray]) -> None:
        """Compare some documents of the partition `name`, of which `tables` are those of the splits.

        Raises:
            Unusable: other tokens, or not those of the text that was read.
        """
        for split, table in tables.items():
            first = -self._seen % EVERY
            self._seen += len(table)
            path = self._work / f"{name}.{split}.bin"
            if first < len(table) and path.exists():  # finished shards took the others
                starts = np.cumsum(table["tokens"]) - table["tokens"]
                for i in range(first, len(table), EVERY):
                    if table["tokens"][i] <= MOST_TOKENS:
                        self._compare(path, int(starts[i]), table[i])

    def _compare(self, path: Path, start: int, row: np.void) -> None:
        offset = (start + 1) * self._dtype.itemsize  # without the <|endoftext|>
        ids = np.fromfile(path, dtype=self._dtype, count=int(row["tokens"]) - 1, offset=offset)
        text = self._tokenizer.decode(ids.tolist())
        same_text = (
            hashlib.sha256(text.encode()).digest()[:16].rstrip(b"\0") == row["key"]
        )  # NumPy drops zeros at the end
        if not same_text or not np.array_equal(self._tokenizer.encode_batch([text])[0], ids):
            raise Unusable(
                f"the package {PACKAGE} encodes {text[:40]!r}… differently from the tokenizer {self._tokenizer.name}; "
                "do without it: --encoder exact"
            )


def remove_leftovers(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete what an interrupted preparation left in `folder`, but the files named in `keep`."""
    for path in sorted(folder.iterdir()):  # the manifest before the shards
        if OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()
