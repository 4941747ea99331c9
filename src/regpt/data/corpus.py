"""The documents of all sources, each with its split: what is held out for validation, and by which rule."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from regpt.data.named import Source
from regpt.data.sources import Document
from regpt.errors import UserError

SMALL_BYTES = 10_000_000  # of sources; below it a two-hundredth would be too little to measure a loss on
SMALL_FRACTION, LARGE_FRACTION = 0.1, 0.005
Split = Literal["train", "val"]


@dataclass
class Corpus:
    """The documents of the sources with their split, and what was learned about them on the way.

    Attributes:
        rule: how the validation split was made: `documents`, `cut` (of the only one), `sources` or `none`.
        records: one object a source file, complete when the documents have been read.
        lowest: the smallest fraction that would have held out a document.
    """

    sources: Sequence[Source]
    val_sources: Sequence[Source]
    text_column: str
    val_fraction: float
    rule: str = "documents"
    records: list[dict[str, Any]] = field(default_factory=list)
    lowest: float = 1.0

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in (*self.sources, *self.val_sources))

    def options(self) -> dict[str, Any]:
        """For the manifest; complete when the documents have been read."""
        return {"val_rule": self.rule, "val_fraction": self.val_fraction, "text_column": self.text_column}

    def documents(self) -> Iterator[tuple[Document, Split]]:
        """Every document that is not empty, with its split: validation files after the others."""
        documents = self._read(self.sources, "train")
        if self.val_sources or not self.val_fraction:
            self.rule = "sources" if self.val_sources else "none"
            for document in documents:
                yield document, "train"
            for document in self._read(self.val_sources, "val"):
                yield document, "val"
        else:
            yield from self._hold_out(documents)

    def check_splits(self, text_bytes: dict[str, int], documents: int) -> None:
        """Raise a UserError when the hash put all of the `documents` into one split."""
        if self.rule != "documents" or all(text_bytes.values()):
            return
        given = f"at --val-fraction {self.val_fraction:g}"
        if not text_bytes["train"]:
            raise UserError(
                f"all {documents:,} documents fell into the validation split {given}; "
                "use a smaller fraction or name validation files with --val"
            )
        enough = int(self.lowest * 100 + 1) / 100  # the next hundredth above
        fix = f"--val-fraction {enough:g}" if enough < 1 else "more documents"
        raise UserError(
            f"none of the {documents:,} documents fell into the validation split {given}; "
            f"use {fix}, name validation files with --val, or do without: --val-fraction 0"
        )

    def _hold_out(self, documents: Iterator[Document]) -> Iterator[tuple[Document, Split]]:
        first = list(itertools.islice(documents, 2))
        if len(first) == 1:
            self.rule = "cut"
            train, val = cut_in_two(first[0], self.val_fraction, self.sources[0].source)
            yield train, "train"
            yield val, "val"
            return
        for document in itertools.chain(first, documents):
            position = hash_fraction(document.text)
            self.lowest = min(self.lowest, position)
            yield document, "val" if position < self.val_fraction else "train"

    def _read(self, sources: Sequence[Source], split: Split) -> Iterator[Document]:
        read: dict[str, int] = {}
        for source in sources:
            record = {**source.record(), "split": split, "documents": 0, "empty": 0}
            for document in source.documents(self.text_column):
                record["documents" if document.text else "empty"] += 1
                if document.text:
                    yield document
            self.records.append(record)
            read[source.source] = read.get(source.source, 0) + record["documents"]
        for name, documents in read.items():
            if not documents:
                raise UserError(f"{name!r} holds no text: every document is empty, or there is none; leave it out")


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def cut_in_two(document: Document, val_fraction: float, name: str) -> tuple[Document, Document]:
    """The two parts of the only document, the last about `val_fraction` of it, cut after a line."""
    text = document.text
    target = int(len(text) * (1 - val_fraction))
    at = (text.rfind("\n", 0, target) + 1) or (text.find("\n", target) + 1)
    if at in (0, len(text)):
        raise UserError(
            f"{name!r} holds one document of one line, so no part can be held out; "
            "give validation files with --val, or --val-fraction 0"
        )
    share = document.source_bytes * at / len(text)
    return Document(text[:at], share), Document(text[at:], document.source_bytes - share)


def default_fraction(sources: Sequence[Source]) -> float:
    return SMALL_FRACTION if sum(source.bytes for source in sources) < SMALL_BYTES else LARGE_FRACTION
