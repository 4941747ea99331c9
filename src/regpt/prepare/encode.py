"""One partition → its files in the work folder: tokens, a table of documents, and last what is known about them.

The same function runs here, in a worker process and on a cluster. It streams: a document is cut where the word pattern
cannot reach across, and about a megabyte of text is in hand at a time.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from regpt.prepare.corpus import cut_in_two, fraction
from regpt.prepare.decontaminate import load_evaluations
from regpt.prepare.dedup import MinHash
from regpt.prepare.document import Document, Unreadable
from regpt.prepare.ngrams import cut
from regpt.prepare.partition import Partition, Reading, Split
from regpt.prepare.parts import Counts, Piece, SignatureFile, SplitFiles, place
from regpt.prepare.settings import Settings
from regpt.text.fast import FastEncoder, find_model
from regpt.text.tokenizer import ENDOFTEXT, Encoder

PIECE_CHARS = 1 << 18  # about 15 ms of encoding: long enough to hide the hand-over, short enough to share a book
BATCH_CHARS = 1 << 20
LONG_LINE = 1_000_000  # characters without a line end


@dataclass
class Left:
    """What was left out here and why; duplicates are found later."""

    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    hits: list[dict[str, Any]] = field(default_factory=list)

    def error(self, number: int, error: Unreadable) -> None:
        self.out(error.reason, 0)
        self.hits.append({"number": number, "reason": error.reason, "error": str(error)})

    def out(self, reason: str, text_bytes: int) -> None:
        count = self.removed.setdefault(reason, {"documents": 0, "text_bytes": 0})
        count["documents"] += 1
        count["text_bytes"] += text_bytes


def encode_partition(
    work: Path,
    partition: Partition,
    settings: Settings,
    encoder: Encoder,
    threads: int = 1,
    progress: Callable[[Counts], None] | None = None,
) -> None:
    """Write `partition`'s files into the folder `work`; `<name>.json`, the last, says that they are complete."""
    reader = Reader(work, settings)
    counts = Counts()
    with contextlib.ExitStack() as files:
        writers: dict[Split, SplitFiles] = {}
        near = settings.dedup == "near"
        signatures = files.enter_context(SignatureFile(work / f"{partition.name}.sig")) if near else None
        for batch in batches(reader.pieces(partition)):
            encoded = encoder.encode_batch([piece.text for piece in batch], threads)
            for split in ("train", "val"):
                chosen = [(piece, ids) for piece, ids in zip(batch, encoded) if piece.split == split]
                if chosen and split not in writers:
                    writers[split] = files.enter_context(SplitFiles(work, f"{partition.name}.{split}", settings))
                if chosen:
                    counts.add(writers[split].write(chosen))
            if signatures:
                signatures.write(batch)
            if progress:
                progress(counts)
        splits = {split: writer.finish() for split, writer in writers.items()}
        check = signatures.finish() if signatures else None
    summary = {"key": partition.key, "splits": splits, "signatures": check, **reader.summary()}
    place(work / f"{partition.name}.json", json.dumps(summary).encode())


class Reader:
    """Reads the documents of one partition, decides which are left out and which are held out."""

    def __init__(self, work: Path, settings: Settings) -> None:
        self._settings = settings
        self._left = Left()
        self._sources: list[dict[str, Any]] = []
        self._lowest = 1.0
        self._number = 0
        self._evaluations = load_evaluations(work) if settings.evaluations else None
        self._minhash = MinHash() if settings.dedup == "near" else None

    def summary(self) -> dict[str, Any]:
        left = {"removed": self._left.removed, "hits": self._left.hits}
        return {"sources": self._sources, "lowest": self._lowest, **left}

    def pieces(self, partition: Partition) -> Iterator[Piece]:
        for reading in partition.readings:
            source = {"rows": 0, "documents": 0, "record": reading.source.record() if reading.first else None}
            notes: Counter[str] = Counter()
            for document in self._documents(reading):
                source["rows"] += 1
                source["documents"] += bool(document.text)
                if document.error:
                    notes["skipped"] += 1
                    self._left.error(self._number, document.error)
                if document.text:
                    notes.update(marks_in(document.text))
                    yield from self._kept(document, reading.split, reading.source.source)
                self._number += 1
            source["notes"] = {name: count for name, count in notes.items() if count}
            reading.check_unchanged()
            self._sources.append(source)

    def _documents(self, reading: Reading) -> Iterator[Document]:
        return reading.source.documents(self._settings.text, reading.part)

    def _kept(self, document: Document, split: Split, name: str) -> Iterator[Piece]:
        data = document.text.encode()
        if reason := self._reason_against(document.text):
            self._left.out(reason, len(data))
        elif self._settings.rule == "cut":
            train, val = cut_in_two(document, self._settings.val_fraction, name)
            yield from self._pieces(train, "train", train.text.encode())
            yield from self._pieces(val, "val", val.text.encode())
        else:
            yield from self._pieces(document, split, data)

    def _reason_against(self, text: str) -> str | None:
        if len(text) < self._settings.min_chars:
            return "short"
        if self._evaluations and (items := self._evaluations.find(text)):
            self._left.hits.append({"number": self._number, "reason": "contaminated", "items": items})
            return "contaminated"
        return None

    def _pieces(self, document: Document, split: Split, data: bytes) -> Iterator[Piece]:
        digest = sha256(data).digest()
        if self._settings.rule == "documents":
            position = fraction(digest)
            self._lowest = min(self._lowest, position)
            split = "val" if position < self._settings.val_fraction else "train"
        signature = self._minhash.signature(document.text) if self._minhash else None
        per_char = document.source_bytes / len(document.text)
        row = (self._number, len(data), digest[:16])
        for i, part in enumerate(cut(document.text, PIECE_CHARS)):
            yield Piece(part, split, None if i else row, signature, per_char * len(part))


def marks_in(text: str) -> dict[str, int]:
    """What is perhaps a mistake in a text, counted for its file: nothing of it is changed."""
    return {
        "crlf": text.count("\r\n"),
        "endoftext": text.count(ENDOFTEXT),
        "long_lines": int(len(text) > LONG_LINE and "\n" not in text),
    }


def batches(pieces: Iterable[Piece], limit: int | None = None) -> Iterator[list[Piece]]:
    """Lists of pieces of about `limit` characters together."""
    batch, chars, limit = [], 0, limit or BATCH_CHARS
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= limit:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def open_encoder(work: Path, settings: Settings) -> Encoder:
    """What the process that began the work in `work` chose, kept from one partition to the next."""
    model = find_model(work) if settings.encoder == "auto" else None
    exact = functools.partial(open_exact, settings.tokenizer)
    return FastEncoder(model, exact) if model else exact()


def open_exact(tokenizer_json: str) -> Encoder:
    from regpt.text.open import from_json  # takes 0.1 s, and most workers do not need it

    return from_json(tokenizer_json)
