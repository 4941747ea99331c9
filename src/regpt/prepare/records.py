"""Records for the manifest and `removed.jsonl`, gathered partition by partition, and their comparison with those of a
finished folder: the same command again has nothing to do."""

import bisect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regpt.data.manifest import SPLITS, Manifest, read_manifest
from regpt.errors import UserError, word
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.dedup import Repeat
from regpt.prepare.partition import Partition
from regpt.prepare.settings import TEXT_OPTIONS
from regpt.text.tokenizer import Tokenizer

Count = dict[str, int]
Record = Mapping[str, Any]
COUNTED = {"exact_duplicate": "exact_duplicates", "near_duplicate": "near_duplicates"}  # in the manifest


@dataclass
class Records:
    """Counts of the partitions so far; documents left out for their content (evaluation items, duplicates, errors)
    become lines of the file `path`.

    Attributes:
        path: the later `removed.jsonl`.
        evaluations: the items looked for.
        sources: the record of every source file, its split, and its numbers of documents, of empty ones, and of those
            that are in the split `val`.
        documents: kept ones of each split.
        text_bytes: UTF-8 bytes of the kept documents of each split.
        removed: documents and bytes left out, by reason.
        lowest: the smallest fraction that would have held out a document.
        rows: documents read, those left out too.
        lines: of the file.
    """

    path: Path
    evaluations: Evaluations | None = None

    sources: list[dict[str, Any]] = field(default_factory=list)
    documents: Count = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: Count = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    removed: dict[str, Count] = field(default_factory=dict)
    lowest: float = 1.0
    rows: int = 0
    lines: int = 0
    _spans: list[tuple[int, dict[str, Any], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = self.path.open("wb")

    def add(
        self,
        partition: Partition,
        found: Mapping[str, Any],
        tables: Mapping[str, np.ndarray],
        kept: Mapping[str, np.ndarray],
        repeats: Sequence[Repeat],
    ) -> None:
        """Count a partition with the summary `found`, its tables of documents, those `kept`, and the duplicates."""
        first = self.rows
        held_out = np.sort(tables["val"]["number"][kept["val"]]) if "val" in tables else np.empty(0, np.int64)
        for reading, source in zip(partition.readings, found["sources"]):
            if source["record"]:
                counts = {"documents": 0, "empty": 0, "val_documents": 0}
                self.sources.append({**source["record"], "split": reading.split, **counts})
            record = self.sources[-1]
            before = sum(record.get(name, 0) for name in ("documents", "empty", "skipped"))
            self._spans.append((self.rows, record, before))
            record["documents"] += source["documents"]
            record["empty"] += source["rows"] - source["documents"] - source["notes"].get("skipped", 0)
            for name, count in source["notes"].items():
                record[name] = record.get(name, 0) + count
            before = self.rows - first
            record["val_documents"] += int(np.diff(np.searchsorted(held_out, (before, before + source["rows"])))[0])
            self.rows += source["rows"]
        for split, table in tables.items():
            self.documents[split] += int(kept[split].sum())
            self.text_bytes[split] += int(table["bytes"][kept[split]].sum())
        for reason, count in found["removed"].items():
            self._count(reason, count["documents"], count["text_bytes"])
        for repeat in repeats:
            self._count(COUNTED[repeat.reason], 1, repeat.text_bytes)
        self.lowest = min(self.lowest, found["lowest"])
        self._write(self._lines(first, found["hits"], repeats))

    def close(self) -> None:
        self._file.close()

    def _lines(self, first: int, hits: Sequence[Mapping[str, Any]], repeats: Sequence[Repeat]) -> list[dict[str, Any]]:
        """In the order of the documents."""
        said: dict[int, dict[str, Any]] = {}
        for repeat in repeats:
            said[repeat.number] = {"reason": repeat.reason, "of": self._locate(repeat.original)}
        for hit in hits:
            named = {name: hit[name] for name in ("reason", "error") if name in hit}
            if "items" in hit:
                assert self.evaluations
                named["items"] = [*map(self.evaluations.locate, hit["items"])]
            said[first + hit["number"]] = named
        return [{**self._locate(number), **said[number]} for number in sorted(said)]

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self.lines += len(lines)

    def _count(self, reason: str, documents: int, text_bytes: int) -> None:
        count = self.removed.setdefault(reason, {"documents": 0, "text_bytes": 0})
        count["documents"] += documents
        count["text_bytes"] += text_bytes

    def _locate(self, number: int) -> dict[str, Any]:
        """Source, file and position in it (from 0, empty ones counted) of a document."""
        first, record, before = self._spans[bisect.bisect_right(self._spans, number, key=lambda span: span[0]) - 1]
        named = {name: record[name] for name in ("source", "file") if name in record}
        return {**named, "document": before + number - first}


def check_finished(
    out: Path, tokenizer: Tokenizer, options: Record, records: Sequence[Record], derived: Collection[str] = ()
) -> Manifest:
    """Return the manifest of `out` if the same tokenizer, options and sources made it.

    `options` and `records` are those of a new manifest; keys that a record lacks, and the options `derived` from the
    text, are not compared.

    Raises:
        UserError: something differs, or the folder is damaged.
    """
    manifest = read_manifest(out)
    options = {**options, **{name: manifest.options.get(name) for name in derived}}
    if difference := next(differences(manifest, tokenizer, options, records), None):
        raise UserError(
            f"{out} already holds a data set, made {difference} (see: regpt data info {word(out)}); choose another "
            "--out or delete it"
        )
    return manifest


def differences(manifest: Manifest, tokenizer: Tokenizer, options: Record, records: Sequence[Record]) -> Iterator[str]:
    """Phrases that begin after `made`; an option that the manifest leaves out has its default."""
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        yield f"with another --tokenizer ({manifest.tokenizer}, now {tokenizer.name})"
    for name in {**options, **manifest.options}:
        both = manifest.options.get(name), options.get(name)
        if both[0] != both[1]:
            given = (getattr(TEXT_OPTIONS, name, None) if value is None else value for value in both)
            before, now = ("none" if value is None else value for value in given)
            yield f"with another {name.replace('_', ' ')} ({before}, now {now})"
    before, now = (
        {(record["source"], record.get("file", ""), record["split"]): record for record in group}
        for group in (manifest.sources, records)
    )
    for name in {**before, **now}:
        shown = f"{name[1]} in {name[0]}" if name[1] else name[0]
        if name not in now or name not in before:
            yield f"{'with' if name in before else 'without'} {shown} for {name[2]}"
        elif any(now[name][key] != before[name][key] for key in now[name].keys() & before[name].keys()):
            yield f"when {shown} had other content"
    if list(before) != list(now):
        yield "from the sources in another order"
