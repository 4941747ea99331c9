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
from regpt.prepare.document import Unreadable
from regpt.prepare.formats import ALLOWED, read_rows, suffix_of
from regpt.prepare.grams import WordCodes, grams
from regpt.prepare.listing import printable, refuse_pointer
from regpt.prepare.sources import sha256_of

N_WORDS = 13
SHIFT = np.uint64(42)  # of a hash, to its first 22 bits


@dataclass(frozen=True)
class Evaluations:
    """Every run of 13 words of the items, sorted by its hash.

    Attributes:
        hashes: (n,) uint64, sorted; a run of several items occurs once for each.
        items: (n,) int64: number of the item.
        files: for each file its name, SHA-256, and the numbers of items and of items too short to be found.
        firsts: number of each file's first item.
    """

    hashes: np.ndarray
    items: np.ndarray
    files: tuple[dict[str, Any], ...]
    firsts: tuple[int, ...]

    def find(self, codes: np.ndarray) -> list[int]:
        """The items of which a text with the word `codes` holds a run of words, ascending."""
        found = grams(codes, N_WORDS)
        found = np.unique(found[self._beginnings[found >> SHIFT]])
        low, high = np.searchsorted(self.hashes, found, "left"), np.searchsorted(self.hashes, found, "right")
        hit = high > low
        ranges = [self.items[a:b] for a, b in zip(low[hit], high[hit])]
        return np.unique(np.concatenate(ranges)).tolist() if ranges else []

    @functools.cached_property
    def _beginnings(self) -> np.ndarray:
        """(2^22,) bool: which first 22 bits occur in a hash; most runs of words are dismissed by it."""
        table = np.zeros(1 << (64 - int(SHIFT)), dtype=bool)
        table[self.hashes >> SHIFT] = True
        return table

    def name(self, item: int) -> dict[str, Any]:
        """File and number in it (from 0) of an item."""
        file = int(np.searchsorted(self.firsts, item, "right")) - 1
        return {"file": self.files[file]["file"], "item": item - self.firsts[file]}

    def save(self, folder: Path) -> None:
        np.save(folder / "grams.npy", self.hashes)
        np.save(folder / "gram-items.npy", self.items)


def load_evaluations(folder: Path) -> Evaluations:
    """What `save` wrote, for `find` only."""
    hashes, items = (np.load(folder / name, mmap_mode="r") for name in ("grams.npy", "gram-items.npy"))
    return Evaluations(hashes, items, (), ())


def read_evaluations(paths: Sequence[str]) -> Evaluations:
    """
    Raises:
        UserError: a file that is not there, of a kind that is not read, damaged, or without a text of 13 words.
    """
    codes, hashes, items, files, firsts, total = WordCodes(), [], [], [], [], 0
    for given in paths:
        path = Path(given)
        if not is_file(path) or not suffix_of(path):
            raise UserError(f"--decontaminate {given!r} is not an evaluation file; give files of {ALLOWED}")
        refuse_pointer(path)
        firsts.append(total)
        short = 0
        for texts in read_items(path):
            found = np.unique(np.concatenate([grams(codes.of(text), N_WORDS) for text in texts] or [hashes_of_none()]))
            hashes.append(found)
            items.append(np.full(len(found), total))
            short += not len(found)
            total += 1
        if total == firsts[-1] + short:
            raise UserError(f"--decontaminate {given!r} holds no text of {N_WORDS} words to look for; leave it out")
        counts = {"items": total - firsts[-1], "too_short": short}
        files.append({"file": printable(given), "sha256": sha256_of(path), **counts})
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    return Evaluations(together[order], np.concatenate(items)[order], tuple(files), tuple(firsts))


def hashes_of_none() -> np.ndarray:
    return np.array([], dtype=np.uint64)


def read_items(path: Path) -> Iterator[list[str]]:
    """The texts of each item."""
    for row in read_rows(path):
        if isinstance(row.value, Unreadable):
            raise row.value
        yield list(strings(row.value))


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, wherever it is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in inner:
            yield from strings(item)
