"""Find documents that hold part of an evaluation: 13 words in a row that one of its items has too.

Thirteen as in GPT-3 (appendix C). A document with one such run is removed whole. An item is a line of .jsonl, a row of
.parquet or a whole .txt or .md file; runs do not cross from one of its texts into the next, and an item without a text
of 13 words cannot be found.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from regpt.data.compression import decompressed
from regpt.data.formats import ALLOWED, JSONL, PARQUET, decode, suffix_of
from regpt.data.grams import WordCodes, grams
from regpt.data.parquet import opened_parquet
from regpt.data.sources import sha256_of
from regpt.errors import UserError
from regpt.files import is_file
from regpt.structured import parse_json

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
        files.append({"file": given, "sha256": sha256_of(path), "items": total - firsts[-1], "too_short": short})
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    return Evaluations(together[order], np.concatenate(items)[order], tuple(files), tuple(firsts))


def hashes_of_none() -> np.ndarray:
    return np.array([], dtype=np.uint64)


def read_items(path: Path) -> Iterator[list[str]]:
    """The texts of each item."""
    suffix = suffix_of(path)
    if suffix in JSONL:
        with path.open("rb") as raw, lines_of(raw, path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield list(strings(parse(decode(line, path, number), path, number)))
    elif suffix in PARQUET:
        with opened_parquet(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from (list(strings(row)) for row in batch.to_pylist())
    else:
        yield [decode(path.read_bytes(), path)]


def lines_of(raw: BinaryIO, path: Path) -> AbstractContextManager[Iterable[bytes]]:
    return nullcontext(raw) if suffix_of(path) == ".jsonl" else decompressed(raw, path)


def parse(line: str, path: Path, number: int) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: not JSON ({error}); a .jsonl file has one JSON object a line"
        ) from None


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, wherever it is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in inner:
            yield from strings(item)
