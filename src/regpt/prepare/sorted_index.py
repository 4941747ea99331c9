"""Keys, a number for each, and which numbers a key has: for more of them than fit into memory.

Sorted arrays, of which each is at least twice as long as the next, so that n entries are in log n of them and are moved
log n times. Long ones are files that the system maps into memory and out of it as it likes.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

IN_MEMORY = 1 << 17  # entries of an array that is not a file
BLOCK = 1 << 17  # entries merged at a time


class Run(NamedTuple):
    """`keys` (n,), ascending, with `numbers` (n,); `files` hold them, or there are none."""

    keys: np.ndarray
    numbers: np.ndarray
    files: tuple[Path, ...] = ()


class SortedIndex:
    """Entries of keys of one `dtype`; files in `folder` begin with `name`, end with `.partial` and go with `close`."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._counter = itertools.count()
        self._runs: list[Run] = []

    def find(self, keys: np.ndarray, limit: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(m,) int64 positions in `keys` (n,), and (m,) int64 numbers: a pair for each entry with such a key, but only
        for the first `limit` of them in an array."""
        positions, numbers = [], []
        for run in self._runs:
            low, high = np.searchsorted(run.keys, keys, "left"), np.searchsorted(run.keys, keys, "right")
            counts = np.minimum(high - low, limit)
            positions.append(np.repeat(np.arange(len(keys)), counts))
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            numbers.append(run.numbers[np.repeat(low, counts) + within])
        nothing = [np.empty(0, dtype=np.int64)]
        return np.concatenate(positions or nothing), np.concatenate(numbers or nothing)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Enter `keys` (n,) with `numbers` (n,)."""
        order = np.argsort(keys, kind="stable")
        run = Run(keys[order].astype(self._dtype), numbers[order].astype(np.int64))
        while self._runs and len(self._runs[-1].keys) < 2 * len(run.keys):
            run = self._merge(self._runs.pop(), run)
        if len(run.keys):
            self._runs.append(run)

    def close(self) -> None:
        while self._runs:
            remove(self._runs.pop())

    def _merge(self, one: Run, other: Run) -> Run:
        if len(one.keys) + len(other.keys) <= IN_MEMORY:
            return merged(one, other)
        number = next(self._counter)
        files = tuple(self._folder / f"{self._name}-{number}.{part}.partial" for part in ("keys", "numbers"))
        with files[0].open("wb") as keys, files[1].open("wb") as numbers:
            for block in merged_blocks(one, other):
                block.keys.tofile(keys)
                block.numbers.tofile(numbers)
        remove(one)
        remove(other)
        return Run(np.memmap(files[0], self._dtype, "r"), np.memmap(files[1], np.int64, "r"), files)


def merged(one: Run, other: Run) -> Run:
    at = np.searchsorted(one.keys, other.keys, "right")
    return Run(np.insert(one.keys, at, other.keys), np.insert(one.numbers, at, other.numbers))


def merged_blocks(one: Run, other: Run) -> Iterator[Run]:
    """The merged entries in their order, some at a time."""
    i = j = 0
    while i < len(one.keys) or j < len(other.keys):
        a, b = one.keys[i : i + BLOCK], other.keys[j : j + BLOCK]
        # What is not read yet of a run is not below the last that is.
        ends = [part[-1] for part, left in ((a, len(one.keys) - i), (b, len(other.keys) - j)) if left > len(part) > 0]
        n_a = int(np.searchsorted(a, min(ends), "right")) if ends else len(a)
        n_b = int(np.searchsorted(b, min(ends), "right")) if ends else len(b)
        yield merged(Run(a[:n_a], one.numbers[i : i + n_a]), Run(b[:n_b], other.numbers[j : j + n_b]))
        i, j = i + n_a, j + n_b


def remove(run: Run) -> None:
    """Delete its files; Windows wants them closed first."""
    for array in (run.keys, run.numbers):
        if isinstance(array, np.memmap):
            array._mmap.close()  # type: ignore[attr-defined]
    for path in run.files:
        path.unlink()
