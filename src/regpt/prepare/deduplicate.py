"""Which documents of encoded partitions, taken in their order, are left out because they repeat earlier ones."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from regpt.prepare.duplicates import NONE, ExactDuplicates, NearDuplicates

Tables = dict[str, np.ndarray]  # of documents (`parts.DOCUMENT`), for each split


class Repeat(NamedTuple):
    """A document that is left out; it and the original are numbered among all that were read."""

    number: int
    reason: str
    original: int
    text_bytes: int


class Deduplication:
    """Takes the partitions in the folder `work`, where it keeps its own files, too; `dedup` is that of `Settings`."""

    def __init__(self, work: Path, dedup: str) -> None:
        self._work = work
        self._exact = ExactDuplicates(work) if dedup != "none" else None
        self._near = NearDuplicates(work) if dedup == "near" else None

    def choose(self, name: str, first: int, tables: Tables) -> tuple[Tables, list[Repeat]]:
        """For each split of the partition `name` (documents,) bool: which stay; and those that do not, in their order.
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
        for index in (self._exact, self._near):
            if index:
                index.close()
