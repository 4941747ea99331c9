"""The order of documents and rows within an epoch: positions only, no tokens. Specified in docs/data-order.md."""

import functools
import math
from dataclasses import dataclass

import numpy as np

# SplitMix64 (Steele, Lea & Flood 2014, figures 16 and 17): the Weyl increment and the two multipliers of its mixer.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
UPPER_HALF = np.uint64(0xFFFFFFFF00000000)

CHUNK = 1 << 20  # documents gathered at once: temporary arrays of all of them would double the memory
# Rounds of the Feistel network: Luby & Rackoff 1988 need 4. Two places stay side by side with a chance of 1/√n every
# second round, so small domains take more.
ROUNDS, SMALL_ROUNDS, SMALL = 8, 24, 1024
ROW_KEYS = 1 << 63  # outputs of the seed from here on are keys of rows; those below are seeds of epochs
OFFSET = 1 << 63  # the output of a key of rows that places the first row; those below are keys of blocks

Positions = int | np.ndarray  # one position, or (n,) int64


class Sequential:
    """As stored, the same in every epoch."""

    def segments(self, epoch: int, begins: Positions, ends: Positions) -> tuple[np.ndarray, np.ndarray]:
        return np.atleast_1d(begins), np.atleast_1d(ends)


class Shuffle:
    """Every document once an epoch, in `permutation(seed, epoch, n)`."""

    def __init__(self, starts: np.ndarray, seed: int) -> None:
        """`starts` (documents + 1,) int64: where each document begins; the last entry is the number of tokens."""
        self.starts = starts
        self.table = functools.lru_cache(maxsize=1)(lambda epoch: epoch_table(starts, seed, epoch))

    def segments(self, epoch: int, begins: Positions, ends: Positions) -> tuple[np.ndarray, np.ndarray]:
        """Stored ranges, int64 begins and ends, that are the token ranges [begins[k], ends[k]) of `epoch`, in order."""
        return self.table(epoch).segments(self.starts, np.atleast_1d(begins), np.atleast_1d(ends))


@dataclass(frozen=True)
class EpochTable:
    """One epoch: 12 bytes a document.

    Attributes:
        documents: (documents,) uint32, document numbers in the order in which they are read.
        ends: (documents,) int64, number of tokens read when that document has been.
    """

    documents: np.ndarray
    ends: np.ndarray

    def segments(self, starts: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Shuffle.segments` within this epoch; O(log documents) a range and O(1) a segment."""
        firsts = np.searchsorted(self.ends, begins, side="right")
        lasts = np.searchsorted(self.ends, ends - 1, side="right")
        n_segments = lasts - firsts + 1
        documents = self.documents[ranges(firsts, n_segments)].astype(np.int64)
        stored_begins, stored_ends = starts[documents], starts[documents + 1]
        after = np.cumsum(n_segments)  # (n,): segments up to the end of each range
        stored_begins[after - n_segments] += begins - np.where(firsts, self.ends[firsts - 1], 0)
        stored_ends[after - 1] -= self.ends[lasts] - ends
        return stored_begins, stored_ends


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


def row_key(seed: int, epoch: int, block: int) -> int:
    """The key of `shuffled` for the rows of one block (a window, or the whole) of `epoch`."""
    return int(splitmix64(int(splitmix64(seed, ROW_KEYS + epoch, 1)[0]), block, 1)[0])


def row_offset(seed: int, epoch: int, seq_len: int) -> int:
    """Where in the stream of `epoch` its first row begins, 0 … `seq_len` - 1: a document is cut anew each epoch."""
    return row_key(seed, epoch, OFFSET) % seq_len


def shuffled(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """(k,) int64: the images of `places` (k,) in a keyed permutation of 0 … n - 1, without a table; O(1) each.

    A generalized Feistel network on pairs (place mod a, place div a), a = ⌊√n⌋ + 1 and b = ⌈n / a⌉, walked on while its
    result is n or above, a·b - n < a places of a·b (Black & Rogaway 2002, "Ciphers with arbitrary finite domains",
    methods 2 and 3). Round r adds output `other half` of SplitMix64 started at output r of SplitMix64 started at `key`.
    """
    a = math.isqrt(n) + 1
    halves = np.uint64(a), np.uint64(-(-n // a))
    seeds = splitmix64(key, 0, SMALL_ROUNDS if n < SMALL else ROUNDS)
    images = places.astype(np.uint64)
    outside = np.arange(len(images))
    while len(outside):
        pair = [images[outside] % halves[0], images[outside] // halves[0]]
        for r, seed in enumerate(seeds):
            pair[r % 2] = (pair[r % 2] + outputs(seed, pair[1 - r % 2]) % halves[r % 2]) % halves[r % 2]
        images[outside] = pair[1] * halves[0] + pair[0]
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def splitmix64(seed: int, first: int, count: int) -> np.ndarray:
    """(count,) uint64: outputs first … first + count - 1 of SplitMix64 started at `seed` modulo 2^64."""
    numbers = np.arange(count, dtype=np.uint64)
    numbers += np.uint64(first)
    return to_outputs(np.uint64(seed % 2**64), numbers)


def outputs(seed: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Outputs `numbers` (n,) uint64, counted from 0, of SplitMix64 started at `seed`: (n,) uint64."""
    return to_outputs(seed, numbers.copy())


def to_outputs(seed: np.uint64, z: np.ndarray) -> np.ndarray:
    """`z`, numbers of outputs, turned into these in place: there may be as many as documents."""
    z += np.uint64(1)
    z *= GAMMA
    z += seed
    z ^= z >> np.uint64(30)
    z *= MIX_1
    z ^= z >> np.uint64(27)
    z *= MIX_2
    z ^= z >> np.uint64(31)
    return z


def ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """firsts[0], firsts[0] + 1, …: counts[0] integers, then those from firsts[1] on, and so on."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)
