"""Text → shards: read documents, hold some out, encode them on all cores, write them in order.

The bytes written depend on the sources, the tokenizer and the options, never on the number of workers: threads encode
batches of pieces (both tokenizers release the GIL), and their results are taken in the order of the text. At most
`2 · workers + 2` batches are in memory.
"""

import contextlib
import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regpt.data.corpus import Corpus, Split, default_fraction
from regpt.data.manifest import Manifest
from regpt.data.named import NAMED_OPTIONS, NamedOptions, open_sources
from regpt.data.sources import Document
from regpt.data.write import ShardWriter, remove_leftovers, sync_folder, write_file
from regpt.errors import UserError
from regpt.text.open import NAMED
from regpt.text.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000  # the size of FineWeb-Edu's shards in build-nanogpt
PIECE_CHARS = 1 << 18  # about 15 ms of encoding: long enough to hide the hand-over, short enough to share a book
# GPT-2's pattern has no piece in which white space follows another character, so text may be cut between the two.
# Python's \S has fewer characters than Rust's: safe.
CUT = re.compile(r"\S(?=[ \n])")


@dataclass(frozen=True)
class Progress:
    """What has been written so far; `done` is the part of the source files, from 0 to 1."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    done: float = 0.0


class Piece(NamedTuple):
    """A document, or a part of a long one; `starts` marks the first part."""

    text: str
    split: Split
    starts: bool
    text_bytes: int
    source_bytes: float


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    *,
    val_sources: Sequence[str] = (),
    val_fraction: float | None = None,
    text_column: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    named: NamedOptions = NAMED_OPTIONS,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the shards of `sources` and their manifest into the folder `out`.

    A document is held out when the first 8 bytes of the SHA-256 of its text, as a fraction of 2^64, are below
    `val_fraction`: copies of a text share a split, and adding files moves no document. A corpus of one document is cut
    into two at the end of a line. The default fraction is 0.1 for sources below 10 MB, 0.005 above. `val_sources` are
    held out instead, when given. `workers` threads encode, by default one a core.

    Raises:
        UserError: sources that cannot be read or are empty, a split without documents, options out of range, an `out`
            that already holds a data set, or a full disk.
    """
    check_options(sources, val_fraction, shard_tokens, workers)
    check_out(out)
    opened, val_opened = open_sources(sources, named), open_sources(val_sources, named)
    corpus = Corpus(opened, val_opened, text_column, default_fraction(opened) if val_fraction is None else val_fraction)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    out.mkdir(exist_ok=True)
    try:
        with contextlib.ExitStack() as failure:  # an error of the sources, Ctrl-C: nothing may look finished
            failure.callback(remove_leftovers, out)
            manifest = write_corpus(corpus, out, tokenizer, shard_tokens, workers or available_cores(), progress)
            failure.pop_all()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {out} is full; free space or choose another --out") from None
        raise
    return manifest


def available_cores() -> int:
    """Cores that this process may use; macOS and Windows do not restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_options(sources: Sequence[str], val_fraction: float | None, shard_tokens: int, workers: int | None) -> None:
    if not sources:
        raise UserError("no SOURCE given; give files, folders, globs or a named set")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError(f"val fraction is {val_fraction}, must be at least 0 and below 1")
    if shard_tokens < 1:
        raise UserError(f"shard tokens is {shard_tokens}, must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, must be at least 1")


def check_out(out: Path) -> None:
    if (out / "manifest.json").exists():
        raise UserError(
            f"{out} already holds a data set (see: regpt data info {out}); choose another --out or delete it"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def write_corpus(
    corpus: Corpus,
    out: Path,
    tokenizer: Tokenizer,
    shard_tokens: int,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> Manifest:
    dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
    with (
        ShardWriter(out, "train", dtype, shard_tokens) as train,
        ShardWriter(out, "val", dtype, shard_tokens) as val,
    ):
        writers: dict[Split, ShardWriter] = {"train": train, "val": val}
        text_bytes = write_documents(corpus, writers, encoded_documents(corpus, tokenizer, workers), progress)
        train.finish()
        val.finish()
    if tokenizer.name not in NAMED:
        write_file(out / "tokenizer.json", tokenizer.to_json().encode())
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot,
        dtype=dtype,
        shards=(*train.shards, *val.shards),
        text_bytes=text_bytes,
        sources=tuple(corpus.records),
        options={**corpus.options(), "shard_tokens": shard_tokens},
    )
    sync_folder(out)  # the shards are there before the file that says so
    write_file(out / "manifest.json", manifest.to_json().encode())
    sync_folder(out)
    return manifest


def write_documents(
    corpus: Corpus,
    writers: dict[Split, ShardWriter],
    encoded: Iterator[list[tuple[Piece, np.ndarray]]],
    progress: Callable[[Progress], None] | None,
) -> dict[str, int]:
    """Write every piece; returns the UTF-8 bytes of each split."""
    text_bytes = {"train": 0, "val": 0}
    documents, tokens, source_bytes, total = 0, 0, 0.0, max(1, corpus.bytes)
    for batch in encoded:
        for piece, ids in batch:
            writers[piece.split].write(ids, starts=piece.starts)
            text_bytes[piece.split] += piece.text_bytes
            documents += piece.starts
            tokens += len(ids)
            source_bytes += piece.source_bytes
        if progress:
            progress(Progress(documents, sum(text_bytes.values()), tokens, min(1.0, source_bytes / total)))
    corpus.check_splits(text_bytes, documents)
    return text_bytes


def pieces(documents: Iterable[tuple[Document, Split]], limit: int = PIECE_CHARS) -> Iterator[Piece]:
    for document, split in documents:
        per_char = document.source_bytes / len(document.text)
        for i, part in enumerate(cut(document.text, limit)):
            yield Piece(part, split, i == 0, len(part.encode()), per_char * len(part))


def cut(text: str, limit: int) -> Iterator[str]:
    """Parts of `text` of about `limit` characters whose encodings, one after another, are the encoding of `text`."""
    start = 0
    while len(text) - start > limit and (place := CUT.search(text, start + limit)):
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def batches(items: Iterable[Piece], limit: int = PIECE_CHARS) -> Iterator[list[Piece]]:
    """Lists of pieces of about `limit` characters together."""
    batch, chars = [], 0
    for piece in items:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= limit:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encoded_documents(corpus: Corpus, tokenizer: Tokenizer, workers: int) -> Iterator[list[tuple[Piece, np.ndarray]]]:
    """Each batch of pieces with its tokens, in order; `workers` threads encode ahead."""
    eot = np.array([tokenizer.eot], dtype=np.uint32)

    def encode(batch: list[Piece]) -> list[tuple[Piece, np.ndarray]]:
        tokens = tokenizer.encode_batch([piece.text for piece in batch])
        return [(piece, np.concatenate((eot, ids)) if piece.starts else ids) for piece, ids in zip(batch, tokens)]

    pool = ThreadPoolExecutor(workers)
    ahead: deque[Future] = deque()
    try:
        for batch in batches(pieces(corpus.documents())):
            ahead.append(pool.submit(encode, batch))
            if len(ahead) > 2 * workers + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
