"""Which documents of a corpus repeat an earlier one; the first, in the order of the input, stays.

Exact: the same text, by 16 bytes of its SHA-256. Near: about 80 % of the runs of five words in common, by MinHash with
128 permutations and locality-sensitive hashing (Broder 1997; the library `datasketch`). The keys of earlier documents
are in memory: 24 bytes a document, and 256 more for near duplicates.
"""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpt.errors import import_extra
from regpt.prepare.ngrams import MULTIPLIER, ngram_hashes

KEY = "S16"
N_WORDS = 5  # of a run
PERMUTATIONS = 128  # standard error of the estimated similarity at most 0.045
THRESHOLD = 0.8  # of the similarity (Jaccard) from which documents are near duplicates; Lee et al. 2022 use it too
# Documents are compared when one of 16 bands of 8 values agrees: 95 % of those with a similarity of 0.8, 99.4 % of 0.85
# (FineWeb has 14 bands of 8; Penedo et al. 2024).
BANDS, ROWS = 16, 8
BLOCK = 1 << 14  # runs hashed at a time: 8 MB
DOCUMENTS = 1 << 10  # compared at a time: their signatures are half a megabyte
LIMIT = 256  # documents with the same band that are looked at in a sorted array: thousands may share a long imprint
OPEN_FILES = 64
NONE, LAST = -1, np.iinfo(np.int64).max
EMPTY = np.iinfo(np.uint32).max  # of a text without runs: all ones
# Of a document of a partition; `number` counts its documents.
SIGNATURE = np.dtype([("number", "<i8"), ("values", "<u4", (PERMUTATIONS,))])
Tables = dict[str, np.ndarray]  # of the documents of a partition (`partition.DOCUMENT`), for each split


class Repeat(NamedTuple):
    """A duplicate that is left out; it and the original are numbered among all documents read."""

    number: int
    reason: str
    original: int
    text_bytes: int


class Dedup:
    """Takes the partitions in the folder `work` in their order; `kind` is `none`, `exact` or `near`."""

    def __init__(self, work: Path, kind: str) -> None:
        self._work = work
        self._exact = ExactDuplicates() if kind != "none" else None
        self._near = NearDuplicates() if kind == "near" else None

    def choose(self, name: str, first: int, tables: Tables) -> tuple[Tables, list[Repeat]]:
        """For each split of the partition `name` (documents,) bool: which stay; and the duplicates, in their order.
        `first` is the number of its first document among all."""
        if self._exact is None or not tables:
            return {split: np.ones(len(table), dtype=bool) for split, table in tables.items()}, []
        together = np.concatenate([*tables.values()])
        order = np.argsort(together["number"], kind="stable")
        ordered = together[order]
        exact = self._exact.add(ordered["key"], first + ordered["number"])
        near = np.full(len(ordered), NONE)
        if self._near:
            rows = np.flatnonzero(exact == NONE)
            near[rows] = self._near.add(self._work / f"{name}.sig", first, rows)
        stays = np.empty(len(ordered), dtype=bool)
        stays[order] = (exact == NONE) & (near == NONE)
        kept = dict(zip(tables, np.split(stays, np.cumsum([len(table) for table in tables.values()])[:-1])))
        return kept, [
            Repeat(first + int(row["number"]), reason, int(originals[i]), int(row["bytes"]))
            for reason, originals in (("exact_duplicate", exact), ("near_duplicate", near))
            for i, row in ((i, ordered[i]) for i in np.flatnonzero(originals != NONE))
        ]

    def close(self) -> None:
        if self._near:
            self._near.close()


class ExactDuplicates:
    """The keys seen so far."""

    def __init__(self) -> None:
        self._index = SortedIndex(KEY)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of the first document with the key of each, or `NONE` where no document had it before,
        in an earlier call or earlier in this one; `keys` (n,) are those of the documents `numbers` (n,)."""
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        originals = numbers[first]
        positions, found = self._index.find(unique)
        originals[positions] = found
        fresh = np.ones(len(unique), dtype=bool)
        fresh[positions] = False
        self._index.add(unique[fresh], originals[fresh])
        originals = originals[inverse]
        return np.where(originals == numbers, NONE, originals)


class MinHash:
    """(PERMUTATIONS,) uint32 for a text: the more of them two texts share, the more runs of words they share."""

    def __init__(self) -> None:
        datasketch = import_extra("datasketch", "--dedup near needs datasketch", "data")
        empty: Any = datasketch.MinHash(PERMUTATIONS, hashfunc=int, scheme="affine32")  # the runs are hashed already
        self._copy = empty.copy

    def signature(self, text: str) -> np.ndarray:
        """All ones for a text of fewer than five words, which resembles nothing."""
        sketch = self._copy()
        runs = np.unique(ngram_hashes(text, N_WORDS) >> np.uint64(32))
        for i in range(0, len(runs), BLOCK):
            sketch.update_batch(runs[i : i + BLOCK].tolist())
        return sketch.hashvalues


class SignatureFile(NamedTuple):
    """A file of `SIGNATURE`s; `ordinal` is that of its first among all, `number` that of the partition's first
    document."""

    path: Path
    ordinal: int
    number: int


class NearDuplicates:
    """The kept documents' bands, and the files that hold their signatures."""

    def __init__(self) -> None:
        self._bands = [SortedIndex("<u8") for _ in range(BANDS)]
        self._files: list[SignatureFile] = []
        self._total = 0
        self._opened = functools.lru_cache(OPEN_FILES)(open_signatures)

    def add(self, path: Path, number: int, rows: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of the first kept document that each document resembles, or `NONE` for those that are
        now kept themselves. The documents are those of `rows` (n,), ascending, in the file of signatures `path`, which
        stays as it is; `number` is that of the first document of its partition."""
        file = SignatureFile(path, self._total, number)
        self._files.append(file)
        self._total += path.stat().st_size // SIGNATURE.itemsize
        blocks = (rows[i : i + DOCUMENTS] + file.ordinal for i in range(0, len(rows), DOCUMENTS))
        return np.concatenate([np.empty(0, dtype=np.int64), *map(self._add_block, blocks)])

    def close(self) -> None:
        """Close the files, which Windows wants before they are deleted."""
        self._opened.cache_clear()

    def _add_block(self, ordinals: np.ndarray) -> np.ndarray:
        numbers, values = self._read(ordinals)
        bands = band_hashes(values)
        originals = self._compare_with_earlier(values, bands)
        seen: dict[tuple[int, int], list[int]] = {}  # of this block
        for i in np.flatnonzero((values != EMPTY).any(axis=1) & (originals == NONE)).tolist():
            keys = list(enumerate(bands[i].tolist()))
            for j in sorted({j for key in keys for j in seen.get(key, ())[:LIMIT]}):
                if (values[i] == values[j]).mean() >= THRESHOLD:
                    originals[i] = numbers[j]
                    break
            else:
                for key in keys:
                    seen.setdefault(key, []).append(i)
        kept = np.unique(list(itertools.chain.from_iterable(seen.values()))).astype(np.int64)
        for k, band in enumerate(self._bands):
            band.add(bands[kept, k], ordinals[kept])
        return originals

    def _compare_with_earlier(self, values: np.ndarray, bands: np.ndarray) -> np.ndarray:
        """(n,) int64: the first kept document of earlier blocks that each of the signatures resembles, or `NONE`."""
        found = [band.find(bands[:, k], LIMIT) for k, band in enumerate(self._bands)]
        pairs = np.unique(np.stack([np.concatenate(part) for part in zip(*found)]), axis=1)
        first = np.full(len(values), LAST, dtype=np.int64)
        for i in range(0, pairs.shape[1], DOCUMENTS):
            positions, others = pairs[:, i : i + DOCUMENTS]
            numbers, other_values = self._read(others)
            alike = (values[positions] == other_values).mean(axis=1) >= THRESHOLD
            np.minimum.at(first, positions[alike], numbers[alike])
        return np.where(first == LAST, NONE, first)

    def _read(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (n,) and signatures (n, PERMUTATIONS) of documents."""
        numbers, values = np.empty(len(ordinals), np.int64), np.empty((len(ordinals), PERMUTATIONS), np.uint32)
        places = np.searchsorted([file.ordinal for file in self._files], ordinals, "right") - 1
        for place in np.unique(places):
            here, file = places == place, self._files[place]
            records = self._opened(file.path)[ordinals[here] - file.ordinal]
            numbers[here], values[here] = records["number"] + file.number, records["values"]
        return numbers, values


def band_hashes(values: np.ndarray) -> np.ndarray:
    """(n, BANDS) uint64 of signatures (n, PERMUTATIONS)."""
    rows = values.reshape(-1, BANDS, ROWS).astype(np.uint64)
    hashes = np.zeros(rows.shape[:2], dtype=np.uint64)
    for k in range(ROWS):
        hashes = (hashes + rows[:, :, k]) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes


def open_signatures(path: Path) -> np.ndarray:
    """(n,) `SIGNATURE`, mapped: the system keeps what is looked at."""
    return np.memmap(path, SIGNATURE, "r") if path.stat().st_size else np.empty(0, SIGNATURE)


class SortedIndex:
    """Keys of one `dtype` with a number each.

    Sorted arrays, of which each is at least twice as long as the next, so that n entries are in log n of them and are
    moved log n times.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # keys (n,), ascending, and their numbers (n,)

    def find(self, keys: np.ndarray, limit: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(m,) int64 positions in `keys` (n,), and (m,) int64 numbers: a pair for each entry with such a key, but only
        for the first `limit` of them in an array."""
        positions, numbers = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for known, owners in self._runs:
            low, high = np.searchsorted(known, keys, "left"), np.searchsorted(known, keys, "right")
            counts = np.minimum(high - low, limit)
            positions.append(np.repeat(np.arange(len(keys)), counts))
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            numbers.append(owners[np.repeat(low, counts) + within])
        return np.concatenate(positions), np.concatenate(numbers)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Enter `keys` (n,) with `numbers` (n,)."""
        order = np.argsort(keys, kind="stable")
        run = keys[order].astype(self._dtype), numbers[order].astype(np.int64)
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            before = self._runs.pop()
            at = np.searchsorted(before[0], run[0], "right")
            run = np.insert(before[0], at, run[0]), np.insert(before[1], at, run[1])
        if len(run[0]):
            self._runs.append(run)
