"""One partition → its files in the work folder: tokens, a table of documents, and last a summary.

The same function runs here, in a worker process and on a cluster. It streams: a document is cut where the word pattern
cannot reach across, and about a megabyte of text is in hand at a time.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from regpt.data.manifest import SPLITS
from regpt.files import rename
from regpt.prepare.decontaminate import load_evaluations
from regpt.prepare.dedup import SIGNATURE, MinHash
from regpt.prepare.documents import Document
from regpt.prepare.ngrams import cut
from regpt.prepare.partition import DOCUMENT, Counts, Partition, Split, total
from regpt.prepare.settings import Settings
from regpt.prepare.split import cut_in_two, fraction
from regpt.text.fast import FastEncoder, find_model
from regpt.text.tokenizer import ENDOFTEXT, Encoder

PIECE_CHARS = 1 << 18  # about 15 ms of encoding: long enough to hide the hand-over, short enough to share a book
BATCH_CHARS = 1 << 20
LONG_LINE = 1_000_000  # characters without a line end


class EncodedPiece(NamedTuple):
    """A document, or a part of a long one; `row` is the document's in the table, or None for a later part."""

    text: str
    split: Split
    row: tuple[int, int, bytes] | None
    signature: np.ndarray | None
    source_bytes: float


def encode_partition(
    work: Path,
    partition: Partition,
    settings: Settings,
    encoder: Encoder,
    threads: int = 1,
    progress: Callable[[Counts], None] | None = None,
) -> None:
    """Write `partition`'s files into the folder `work`; `<name>.json`, the last, makes them valid."""
    reader = PartitionReader(work, settings, encoder.seam)
    with PartitionFiles(work / partition.name, settings) as files:
        for batch in batches(reader.pieces(partition)):
            encoded = encoder.encode_batch([piece.text for piece in batch], threads)
            files.write(list(zip(batch, encoded)))
            if progress:
                progress(total(files.counts.values()))
        summary = {"key": partition.key, **files.finish(), **reader.summary()}
    with CheckedFile(work / f"{partition.name}.json") as file:
        file.write(json.dumps(summary).encode())
        file.finish()


class PartitionReader:
    """Reads the documents of one partition, decides which are left out and which are held out."""

    def __init__(self, work: Path, settings: Settings, seam: re.Pattern[str] | None) -> None:
        self._settings, self._seam = settings, seam
        self._removed: dict[str, dict[str, int]] = {}
        self._hits: list[dict[str, Any]] = []  # of `removed.jsonl`; duplicates are found later
        self._sources: list[dict[str, Any]] = []
        self._lowest = 1.0
        self._number = 0
        self._evaluations = load_evaluations(work) if settings.evaluations else None
        self._minhash = MinHash() if settings.dedup == "near" else None

    def summary(self) -> dict[str, Any]:
        return {"sources": self._sources, "lowest": self._lowest, "removed": self._removed, "hits": self._hits}

    def pieces(self, partition: Partition) -> Iterator[EncodedPiece]:
        for reading in partition.readings:
            source = {"rows": 0, "documents": 0, "record": reading.source.record() if reading.first else None}
            notes: Counter[str] = Counter()
            for document in reading.source.documents(self._settings.text, reading.part):
                source["rows"] += 1
                source["documents"] += bool(document.text)
                if document.error:
                    notes["skipped"] += 1
                    self._remove(document.error.reason, 0, error=str(document.error))
                if document.text:
                    notes.update(marks_in(document.text))
                    yield from self._kept(document, reading.split, reading.source.source)
                self._number += 1
            source["notes"] = {name: count for name, count in notes.items() if count}
            reading.check_unchanged()
            self._sources.append(source)

    def _kept(self, document: Document, split: Split, name: str) -> Iterator[EncodedPiece]:
        data = document.text.encode()
        if len(document.text) < self._settings.min_chars:
            self._remove("short", len(data))
        elif self._evaluations and (items := self._evaluations.find(document.text)):
            self._remove("contaminated", len(data), items=items)
        elif self._settings.rule == "cut":
            train, val = cut_in_two(document, self._settings.val_fraction, name)
            yield from self._pieces(train, "train", train.text.encode())
            yield from self._pieces(val, "val", val.text.encode())
        else:
            yield from self._pieces(document, split, data)

    def _remove(self, reason: str, text_bytes: int, **details: Any) -> None:
        count = self._removed.setdefault(reason, {"documents": 0, "text_bytes": 0})
        count["documents"] += 1
        count["text_bytes"] += text_bytes
        if details:
            self._hits.append({"number": self._number, "reason": reason, **details})

    def _pieces(self, document: Document, split: Split, data: bytes) -> Iterator[EncodedPiece]:
        digest = sha256(data).digest()
        if self._settings.rule == "documents":
            position = fraction(digest)
            self._lowest = min(self._lowest, position)
            split = "val" if position < self._settings.val_fraction else "train"
        signature = self._minhash.signature(document.text) if self._minhash else None
        per_char = document.source_bytes / len(document.text)
        row = (self._number, len(data), digest[:16])
        for i, part in enumerate(cut(document.text, PIECE_CHARS, self._seam)):
            yield EncodedPiece(part, split, None if i else row, signature, per_char * len(part))


def marks_in(text: str) -> dict[str, int]:
    """Counts of possible mistakes in a text, for the record of its file; the text is not changed."""
    return {
        "crlf": text.count("\r\n"),
        "endoftext": text.count(ENDOFTEXT),
        "long_lines": int(len(text) > LONG_LINE and "\n" not in text),
    }


def batches(pieces: Iterable[EncodedPiece]) -> Iterator[list[EncodedPiece]]:
    """Lists of pieces of about `BATCH_CHARS` characters together."""
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def open_encoder(work: Path, settings: Settings) -> Encoder:
    """The encoder of the process that began the work in `work`, kept from one partition to the next."""
    model = find_model(work) if settings.encoder == "auto" else None
    exact = functools.partial(open_exact, settings.tokenizer)
    return FastEncoder(model, exact) if model else exact()


def open_exact(tokenizer_json: str) -> Encoder:
    from regpt.text.open import from_json  # takes 0.1 s, and most workers do not need it

    return from_json(tokenizer_json)


class PartitionFiles:
    """The files of one partition: `.SPLIT.bin` (tokens) and `.SPLIT.docs` (`DOCUMENT` rows) of each split that has
    documents, and `.sig` where near duplicates are looked for."""

    def __init__(self, stem: Path, settings: Settings) -> None:
        self.counts: dict[str, Counts] = {}
        self._stem, self._files = stem, dict[str, CheckedFile]()
        self._eot = np.array([settings.eot], dtype=np.uint32)
        self._dtype = np.dtype(settings.dtype).newbyteorder("<")
        self._open: dict[str, tuple[int, int, int, bytes]] = {}  # the document that may continue in the next batch

    def write(self, pieces: Sequence[tuple[EncodedPiece, np.ndarray]]) -> None:
        """Append pieces with their tokens, in the order of the text."""
        for split in SPLITS:
            if own := [(piece, ids) for piece, ids in pieces if piece.split == split]:
                self._write_split(split, own)
        rows = [(piece.row[0], piece.signature) for piece, _ in pieces if piece.row and piece.signature is not None]
        if rows:
            self._append("sig", np.array(rows, dtype=SIGNATURE))

    def finish(self) -> dict[str, Any]:
        """Give the files their names; their sizes and checksums, and the counts."""
        for split, row in self._open.items():
            self._append(f"{split}.docs", np.array([row], dtype=DOCUMENT))
        checks = {suffix: file.finish() for suffix, file in self._files.items()}
        return {"splits": {split: asdict(counts) for split, counts in self.counts.items()}, "files": checks}

    def __enter__(self) -> "PartitionFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(*error)

    def _write_split(self, split: str, pieces: Sequence[tuple[EncodedPiece, np.ndarray]]) -> None:
        tokens, rows, counts = [], [], self.counts.setdefault(split, Counts())
        for piece, ids in pieces:
            if piece.row is not None:
                number, text_bytes, key = piece.row
                rows += [self._open[split]] if split in self._open else []
                self._open[split] = (number, 1, text_bytes, key)
                tokens.append(self._eot)
                counts.add(Counts(1, text_bytes, 1))
            number, before, text_bytes, key = self._open[split]
            self._open[split] = (number, before + len(ids), text_bytes, key)
            tokens.append(ids)
            counts.add(Counts(0, 0, len(ids), piece.source_bytes))
        self._append(f"{split}.bin", np.concatenate(tokens, dtype=self._dtype, casting="unsafe"))  # n_vocab fits
        self._append(f"{split}.docs", np.array(rows, dtype=DOCUMENT))

    def _append(self, suffix: str, data: np.ndarray) -> None:
        if suffix not in self._files:
            self._files[suffix] = CheckedFile(self._stem.with_name(f"{self._stem.name}.{suffix}"))
        self._files[suffix].write(data)


class CheckedFile:
    """A file that has its name when it is whole, and a checksum to verify it later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Two processes may write the same one: a worker whose task was given to another for dead.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        self._file: BinaryIO = self._partial.open("wb")
        self._size, self._crc = 0, 0

    def write(self, data: bytes | np.ndarray) -> None:
        view = data if isinstance(data, bytes) else data.view(np.uint8).data
        self._file.write(view)
        self._size += len(view)
        self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> list[int]:
        self._file.close()
        rename(self._partial, self._path)
        return [self._size, self._crc]

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again
            self._file.close()
        self._partial.unlink(missing_ok=True)
