"""What the manifest and `removed.jsonl` say about a preparation, gathered partition by partition."""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regpt.data.contamination import Evaluations
from regpt.data.manifest import SPLITS
from regpt.data.partition import Partition

Count = dict[str, int]


@dataclass
class Summary:
    """
    Attributes:
        sources: the record of every source file, its split, and its numbers of documents, of empty ones, and of those
            that are in the split `val`.
        documents: kept ones of each split.
        text_bytes: UTF-8 bytes of the kept documents of each split.
        removed: documents and bytes left out, by reason.
        lowest: the smallest fraction that would have held out a document.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    documents: Count = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: Count = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    removed: dict[str, Count] = field(default_factory=dict)
    lowest: float = 1.0
    _hits: list[tuple[int, list[int]]] = field(default_factory=list)
    _near: list[tuple[int, int]] = field(default_factory=list)
    _spans: list[tuple[int, dict[str, Any], int]] = field(default_factory=list)
    _rows: int = 0

    def add(
        self,
        partition: Partition,
        found: Mapping[str, Any],
        tables: Mapping[str, np.ndarray],
        kept: Mapping[str, np.ndarray],
    ) -> None:
        """Count a partition of which `found` is known, and its tables of documents with what was `kept` of them."""
        first = self._rows
        held_out = np.sort(tables["val"]["number"][kept["val"]]) if "val" in tables else np.empty(0, np.int64)
        for reading, source in zip(partition.readings, found["sources"]):
            if source["record"]:
                counts = {"documents": 0, "empty": 0, "val_documents": 0}
                self.sources.append({**source["record"], "split": reading.split, **counts})
            record = self.sources[-1]
            self._spans.append((self._rows, record, record["documents"] + record["empty"]))
            record["documents"] += source["documents"]
            record["empty"] += source["rows"] - source["documents"]
            before = self._rows - first
            record["val_documents"] += int(np.diff(np.searchsorted(held_out, (before, before + source["rows"])))[0])
            self._rows += source["rows"]
        for split, table in tables.items():
            self.documents[split] += int(kept[split].sum())
            self.text_bytes[split] += int(table["bytes"][kept[split]].sum())
        for reason, count in found["removed"].items():
            self._count(reason, count["documents"], count["text_bytes"])
        self._hits += [(first + hit["number"], hit["items"]) for hit in found["hits"]]
        self.lowest = min(self.lowest, found["lowest"])

    def drop(self, reason: str, text_bytes: Sequence[int] | np.ndarray) -> None:
        """Count documents of such sizes as left out."""
        if len(text_bytes):
            self._count(reason, len(text_bytes), int(sum(text_bytes)))

    def resembles(self, number: int, original: int) -> None:
        """Note that a document is left out because it resembles another; both numbered among all that were read."""
        self._near.append((number, original))

    def removed_lines(self, evaluations: Evaluations | None) -> str:
        """`removed.jsonl`: a line for each document with evaluation items in it, and for each near duplicate."""
        lines = [
            {**self._locate(number), "reason": "contaminated", "items": [*map(evaluations.name, items)]}
            for number, items in self._hits
            if evaluations
        ]
        lines += [
            {**self._locate(number), "reason": "near_duplicate", "of": self._locate(original)}
            for number, original in self._near
        ]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _count(self, reason: str, documents: int, text_bytes: int) -> None:
        count = self.removed.setdefault(reason, {"documents": 0, "text_bytes": 0})
        count["documents"] += documents
        count["text_bytes"] += text_bytes

    def _locate(self, number: int) -> dict[str, Any]:
        """Source, file and position in it (from 0, empty ones counted) of a document."""
        first, record, before = self._spans[bisect.bisect_right(self._spans, number, key=lambda span: span[0]) - 1]
        named = {name: record[name] for name in ("source", "file") if name in record}
        return {**named, "document": before + number - first}
