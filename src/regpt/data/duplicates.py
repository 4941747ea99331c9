"""Which documents of a corpus repeat an earlier one; the first, in the order of the input, stays.

Exact: the same text, by 16 bytes of its SHA-256; memory is those 16 bytes a document. Near: about 80 % of the runs of
five words in common, by MinHash with 128 permutations and locality-sensitive hashing (Broder 1997; the library
`datasketch`); every kept document costs about 3 kB of memory.
"""

from typing import Any

import numpy as np

from regpt.data.grams import WordCodes, grams
from regpt.errors import UserError

KEY = "S16"
N_WORDS = 5  # of a run
PERMUTATIONS = 128  # standard error of the estimated similarity at most 0.045
THRESHOLD = 0.8  # of the similarity (Jaccard) from which documents are near duplicates; Lee et al. 2022 use it too
BLOCK = 1 << 14  # runs hashed at a time: 8 MB


class ExactDuplicates:
    """The keys seen so far, in sorted arrays of which the next is at least twice as long: `2 log n` looks a key."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bool: which of `keys` (n,) were seen before, in an earlier call or earlier in this one."""
        unique, first = np.unique(keys, return_index=True)
        repeated = np.ones(len(keys), dtype=bool)
        repeated[first] = False
        for seen in self._sorted:
            at = np.minimum(np.searchsorted(seen, unique), len(seen) - 1)
            repeated[first[seen[at] == unique]] = True
        self._keep(unique[~repeated[first]])
        return repeated

    def _keep(self, fresh: np.ndarray) -> None:
        while self._sorted and len(self._sorted[-1]) < 2 * len(fresh):
            fresh = np.sort(np.concatenate((self._sorted.pop(), fresh)), kind="stable")
        if len(fresh):
            self._sorted.append(fresh)


class Signatures:
    """(PERMUTATIONS,) uint32 for a text: the more of them two texts share, the more runs of words they share."""

    def __init__(self) -> None:
        self._minhash, self._codes = import_datasketch().MinHash, WordCodes()
        self._permutations = self._minhash(PERMUTATIONS).permutations

    def of(self, text: str) -> np.ndarray:
        """All ones for a text of fewer than five words, which resembles nothing."""
        sketch = self._minhash(
            PERMUTATIONS, hashfunc=int, permutations=self._permutations, scheme="affine32"
        )  # the runs are hashed already
        runs = np.unique(grams(self._codes.of(text), N_WORDS) >> np.uint64(32))
        for i in range(0, len(runs), BLOCK):
            sketch.update_batch(runs[i : i + BLOCK].tolist())
        return sketch.hashvalues


class NearDuplicates:
    """The kept documents' signatures, found again by their bands."""

    def __init__(self) -> None:
        datasketch = import_datasketch()
        self._sketch = datasketch.LeanMinHash
        self._index = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._kept: dict[int, np.ndarray] = {}

    def add(self, number: int, signature: np.ndarray) -> int | None:
        """The number of the first kept document that document `number` resembles; kept itself when there is none."""
        if (signature == np.iinfo(np.uint32).max).all():
            return None
        sketch = self._sketch(seed=1, hashvalues=signature, scheme="affine32")
        alike = [other for other in self._index.query(sketch) if (self._kept[other] == signature).mean() >= THRESHOLD]
        if alike:
            return min(alike)
        self._index.insert(number, sketch, check_duplication=False)
        self._kept[number] = signature
        return None


def import_datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise UserError("--dedup near needs datasketch; install it with: pip install 'regpt[data]'") from None
    return datasketch
