"""In which order the documents of a split are read: positions only, no tokens. Specified in docs/data-order.md."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

# SplitMix64 (Steele, Lea & Flood 2014, figures 16 and 17): the Weyl increment and the two multipliers of its mixer.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
UPPER_HALF = np.uint64(0xFFFFFFFF00000000)

Table = TypeVar("Table")

CHUNK = 1 << 20  # documents gathered at once: temporary arrays of all of them would double the memory


class Order(Protocol):
    """Where the tokens of an epoch are stored. An epoch reads every stored token once."""

    def segments(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Stored ranges [begins[k], ends[k]), int64, that together are tokens [begin, end) of `epoch`, in order."""
        ...


class Sequential:
    """As stored, the same in every epoch."""

    def segments(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([begin]), np.array([end])


class Shuffle:
    """Every document once an epoch, in `permutation(seed, epoch, n)`."""

    def __init__(self, starts: np.ndarray, seed: int) -> None:
        """`starts` (documents + 1,) int64: where each document begins; the last entry is the number of tokens."""
        self.starts = starts
        self.tables = EpochTables(lambda epoch: epoch_table(starts, seed, epoch))

    def segments(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        table = self.tables.get(epoch, read=end / int(self.starts[-1]))
        return table.segments(self.starts, begin, end)


class EpochTables(Generic[Table]):
    """One table an epoch, the next one made in a background thread when reading comes near the end of one.

    A table is a function of the epoch, so nothing depends on when it is made.
    """

    def __init__(self, make: Callable[[int], Table]) -> None:
        self.make = make
        self.tables: dict[int, Future[Table]] = {}  # of the epoch read last and, near its end, the next
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="regpt-data-order")

    def get(self, epoch: int, read: float) -> Table:
        """The table of `epoch`, of which the share `read` has been read."""
        self.tables = {e: table for e, table in self.tables.items() if e in (epoch, epoch + 1)}
        table = self.start(epoch)
        if read > 7 / 8:  # the last eighth lasts longer than making a table, for all but toy corpora
            self.start(epoch + 1)
        return table.result()

    def start(self, epoch: int) -> "Future[Table]":
        if epoch not in self.tables:
            self.tables[epoch] = self.background.submit(self.make, epoch)
        return self.tables[epoch]


@dataclass(frozen=True)
class EpochTable:
    """One epoch: 12 bytes a document.

    Attributes:
        documents: (documents,) uint32, document numbers in the order in which they are read.
        ends: (documents,) int64, number of tokens read when that document has been.
    """

    documents: np.ndarray
    ends: np.ndarray

    def segments(self, starts: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """`Order.segments` within this epoch; O(log documents) and O(segments)."""
        first, last = np.searchsorted(self.ends, (begin, end - 1), side="right")
        documents = self.documents[first : last + 1].astype(np.int64)
        begins, ends = starts[documents], starts[documents + 1]
        begins[0] += begin - (self.ends[first - 1] if first else 0)
        ends[-1] -= self.ends[last] - end
        return begins, ends


def epoch_table(starts: np.ndarray, seed: int, epoch: int) -> EpochTable:
    """The table of `epoch` for documents that begin at `starts`; O(documents log documents)."""
    documents = permutation(seed, epoch, len(starts) - 1)
    ends = np.empty(len(documents), dtype=np.int64)
    for begin in range(0, len(documents), CHUNK):
        chunk = documents[begin : begin + CHUNK].astype(np.int64)
        ends[begin : begin + CHUNK] = starts[chunk + 1] - starts[chunk]
    np.cumsum(ends, out=ends)
    return EpochTable(documents, ends)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) uint32: document numbers in the order of `epoch`, which is the stable argsort of their 32-bit keys.

    Key d is the upper half of output d of SplitMix64 seeded with output `epoch` of SplitMix64 seeded with `seed`,
    outputs counted from 0.
    """
    assert n <= 2**32
    epoch_seed = int(splitmix64(seed, epoch, 1)[0])
    keys = splitmix64(epoch_seed, 0, n)
    # Sorting (key, document) pairs packed in one integer is the stable argsort, and several times as fast.
    keys &= UPPER_HALF
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    return keys.astype(np.uint32)  # keeps the lower half


def splitmix64(seed: int, first: int, count: int) -> np.ndarray:
    """(count,) uint64: outputs first … first + count - 1 of SplitMix64 started at `seed` modulo 2^64."""
    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    z *= GAMMA
    z += np.uint64(seed % 2**64)
    z ^= z >> np.uint64(30)
    z *= MIX_1
    z ^= z >> np.uint64(27)
    z *= MIX_2
    z ^= z >> np.uint64(31)
    return z
