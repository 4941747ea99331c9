"""Find documents that hold part of an evaluation: 13 words in a row that one of its items has too.

Thirteen as in GPT-3 (appendix C). A document with one such run is removed whole. An item is a line of .jsonl, a row of
.parquet or a whole .txt or .md file; runs do not cross from one of its texts into the next, and an item without a text
of 13 words cannot be found.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regpt.errors import UserError
from regpt.files import is_file
from regpt.prepare.documents import Unreadable
from regpt.prepare.listing import printable, refuse_pointer
from regpt.prepare.ngrams import ngram_hashes
from regpt.prepare.readers import ALLOWED, read_table_rows, suffix_of
from regpt.prepare.sources import sha256_of

N_WORDS = 13
SHIFT = np.uint64(42)  # of a hash, to its first 22 bits
STORED = ("ngrams.npy", "ngram-items.npy")


@dataclass(frozen=True)
class Evaluations:
    """Every run of 13 words of the items, sorted by its hash.

    Attributes:
        hashes: (n,) uint64, sorted; a run of several items occurs once for each.
        items: (n,) int64: number of the item.
        files: for each file its name, SHA-256, and the numbers of items and of items too short to be found.
    """

    hashes: np.ndarray
    items: np.ndarray
    files: tuple[dict[str, Any], ...] = ()

    def find(self, text: str) -> list[int]:
        """The items of which `text` holds a run of words, ascending."""
        found = ngram_hashes(text, N_WORDS)
        found = np.unique(found[self._prefixes[found >> SHIFT]])
        low, high = np.searchsorted(self.hashes, found, "left"), np.searchsorted(self.hashes, found, "right")
        return sorted({int(item) for a, b in zip(low, high) for item in self.items[a:b]})

    @functools.cached_property
    def _prefixes(self) -> np.ndarray:
        """(2^22,) bool: which first 22 bits occur in a hash; most runs of words are dismissed by it."""
        table = np.zeros(1 << (64 - int(SHIFT)), dtype=bool)
        table[self.hashes >> SHIFT] = True
        return table

    def locate(self, item: int) -> dict[str, Any]:
        """File and number in it (from 0) of an item."""
        for file in self.files:
            if item < file["items"]:
                return {"file": file["file"], "item": item}
            item -= file["items"]
        raise IndexError(item)

    def save(self, folder: Path) -> None:
        for name, array in zip(STORED, (self.hashes, self.items)):
            np.save(folder / name, array)


def load_evaluations(folder: Path) -> Evaluations:
    """The arrays that `save` wrote, for `find` only."""
    return Evaluations(*(np.load(folder / name, mmap_mode="r") for name in STORED))


def read_evaluations(paths: Sequence[str]) -> Evaluations:
    """
    Raises:
        UserError: no such file, or one of a kind that is not read, damaged, or without a text of 13 words.
    """
    hashes, files = [], []
    for given in paths:
        path = Path(given)
        if not is_file(path) or not suffix_of(path):
            raise UserError(f"--decontaminate {given!r} is not an evaluation file; give files of {ALLOWED}")
        refuse_pointer(path)
        items_of_file = ([ngram_hashes(text, N_WORDS) for text in texts] for texts in read_items(path))
        found = [np.unique(np.concatenate([np.array([], np.uint64), *runs])) for runs in items_of_file]
        short = sum(not len(runs) for runs in found)
        if short == len(found):
            raise UserError(f"--decontaminate {given!r} holds no text of {N_WORDS} words to look for; leave it out")
        hashes += found
        counts = {"items": len(found), "too_short": short}
        files.append({"file": printable(given), "sha256": sha256_of(path), **counts})
    together = np.concatenate(hashes)
    items = np.repeat(np.arange(len(hashes)), [len(runs) for runs in hashes])
    order = np.argsort(together, kind="stable")
    return Evaluations(together[order], items[order], tuple(files))


def read_items(path: Path) -> Iterator[list[str]]:
    """The texts of each item."""
    for row in read_table_rows(path):
        if isinstance(row.value, Unreadable):
            raise row.value
        yield list(strings(row.value))


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in inner:
            yield from strings(item)
