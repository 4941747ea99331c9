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

CHUNK = 1 << 20  # documents gathered at once: temporaries for all documents would double the memory
# Rounds of the Feistel network: Luby & Rackoff 1988 need 4. Neighbouring rows stay neighbours through two rounds with
# probability 1/√n, so small domains (below SMALL) take more.
ROUNDS, SMALL_ROUNDS, SMALL = 8, 24, 1024
ROW_KEYS = 1 << 63  # of SplitMix64(seed), output e seeds the documents of epoch e, and output 2^63 + e its rows
OFFSET = 1 << 63  # of SplitMix64(seed of the rows), output w is the key of block w, and output 2^63 the offset

Positions = int | np.ndarray  # one position, or (n,) int64


class Sequential:
    """Stored order, the same in every epoch; the interface of `Shuffle`."""

    def segments(self, epoch: int, begins: Positions, ends: Positions) -> tuple[np.ndarray, np.ndarray]:
        return np.atleast_1d(begins), np.atleast_1d(ends)


class Shuffle:
    """Shuffled documents: each once an epoch, in the order of `permutation(seed, epoch, n)`."""

    def __init__(self, starts: np.ndarray, seed: int) -> None:
        """`starts` (documents + 1,) int64: where each document begins; the last entry is the number of tokens."""
        self.starts = starts
        self.table = functools.lru_cache(maxsize=1)(lambda epoch: epoch_table(starts, seed, epoch))

    def segments(self, epoch: int, begins: Positions, ends: Positions) -> tuple[np.ndarray, np.ndarray]:
        """Map token ranges [begins[k], ends[k]) of the shuffled epoch to ranges of stored tokens (int64 begins, ends).

        A range that spans several documents becomes several stored ranges, in order.
        """
        return self.table(epoch).segments(self.starts, np.atleast_1d(begins), np.atleast_1d(ends))


@dataclass(frozen=True)
class EpochTable:
    """Order of the documents in one epoch; 12 bytes a document.

    Attributes:
        documents: (documents,) uint32, document numbers in the order in which they are read.
        ends: (documents,) int64, where each of them ends in the epoch's stream: the cumulative sum of their lengths.
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
        # Whole documents so far: trim the first document of each range at its begin, the last one at its end.
        stored_begins[after - n_segments] += begins - np.where(firsts, self.ends[firsts - 1], 0)
        stored_ends[after - 1] -= self.ends[lasts] - ends
        return stored_begins, stored_ends


def epoch_table(starts: np.ndarray, seed: int, epoch: int) -> EpochTable:
    """Build the table of `epoch` for documents that begin at `starts`; O(documents log documents)."""
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
    # Sorting (key, document) pairs packed into one integer equals a stable argsort and is several times as fast.
    keys &= UPPER_HALF
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    return keys.astype(np.uint32)  # keeps the lower half


def row_key(seed: int, epoch: int, block: int) -> int:
    """Key of `shuffled` for one block of rows (a window, or the whole epoch)."""
    return int(splitmix64(int(splitmix64(seed, ROW_KEYS + epoch, 1)[0]), block, 1)[0])


def row_offset(seed: int, epoch: int, seq_len: int) -> int:
    """Offset of the first row in the stream of `epoch`, 0 … `seq_len` - 1: rows cut documents elsewhere each epoch."""
    return row_key(seed, epoch, OFFSET) % seq_len


def shuffled(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Images (k,) int64 of `places` (k,) under a keyed permutation of 0 … n - 1; no table, O(1) each.

    A generalized Feistel network on the halves (place mod a, place div a), a = ⌊√n⌋ + 1 and b = ⌈n / a⌉, with cycle
    walking: it is applied again while the image is n or above, which fewer than a of the a·b images are (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3). In round r, one half is the index of an
    output of SplitMix64, seeded with output r of SplitMix64 seeded with `key`; that output is added to the other half.
    """
    a = math.isqrt(n) + 1
    halves = np.uint64(a), np.uint64(-(-n // a))
    seeds = splitmix64(key, 0, SMALL_ROUNDS if n < SMALL else ROUNDS)
    images = places.astype(np.uint64)
    outside = np.arange(len(images))  # indices of images still to be walked into 0 … n - 1
    while len(outside):
        pair = [images[outside] % halves[0], images[outside] // halves[0]]
        for r, seed in enumerate(seeds):
            pair[r % 2] = (pair[r % 2] + outputs(seed, pair[1 - r % 2]) % halves[r % 2]) % halves[r % 2]
        images[outside] = pair[1] * halves[0] + pair[0]
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def splitmix64(seed: int, first: int, count: int) -> np.ndarray:
    """Outputs first … first + count - 1 of SplitMix64 seeded with `seed` modulo 2^64: (count,) uint64."""
    numbers = np.arange(count, dtype=np.uint64)
    numbers += np.uint64(first)
    return to_outputs(np.uint64(seed % 2**64), numbers)


def outputs(seed: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Outputs number `numbers` (n,) uint64, from 0, of SplitMix64 seeded with `seed`: (n,) uint64."""
    return to_outputs(seed, numbers.copy())


def to_outputs(seed: np.uint64, z: np.ndarray) -> np.ndarray:
    """Replace the indices `z` by the outputs of SplitMix64 in place: `z` may have an entry for every document."""
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
    """Concatenate the integers of [firsts[k], firsts[k] + counts[k]) for all k."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)
