"""Which documents a row is made of: for messages about a batch, not for reading it."""

from dataclasses import dataclass

import numpy as np

from regpt.data.bos import PackedRows
from regpt.data.mixture import MixedRows
from regpt.data.packed import ConversationRows
from regpt.data.rows import Rows, ShuffledRows, StreamRows
from regpt.data.stream import ShardStream, StoredTokens, by_epoch


@dataclass(frozen=True)
class DocumentSlice:
    """A part of a document in a row.

    Attributes:
        folder: of the shards.
        document: its number in the split, in the order in which documents are stored.
        offset: tokens of the document before this part.
        row: the row's number in the run.
        place: tokens of the row before this part.
        tokens: (n,) unsigned integers.
    """

    folder: str
    document: int
    offset: int
    row: int
    place: int
    tokens: np.ndarray


def row_pieces(rows: Rows, row: int) -> list[DocumentSlice]:
    """The parts that `row`, its last target included, is made of, from left to right."""
    if isinstance(rows, ConversationRows):
        return conversation_pieces(rows, row)
    corpus, begins, ends = stored_ranges(rows, row)
    starts = corpus.starts
    pieces: list[DocumentSlice] = []
    place = 0
    for begin, end in zip(begins.tolist(), ends.tolist()):
        while begin < end:  # a stored range of `sequential` spans several documents
            document = int(np.searchsorted(starts, begin, side="right")) - 1
            stop = min(end, int(starts[document + 1]))
            tokens = corpus.read(np.array([begin]), np.array([stop]))
            pieces.append(
                DocumentSlice(str(corpus.folder), document, begin - int(starts[document]), row, place, tokens)
            )
            place += stop - begin
            begin = stop
    return pieces


def conversation_pieces(rows: ConversationRows, row: int) -> list[DocumentSlice]:
    """The conversations in `row`, whole."""
    documents, _, places = rows.layout(row, 1)
    folder, starts = str(rows.corpus.folder), rows.starts
    tokens = [rows.corpus.read(starts[d : d + 1], starts[d + 1 : d + 2]) for d in documents]
    found = zip(documents.tolist(), places.tolist(), tokens)
    return [DocumentSlice(folder, document, 0, row, place, own) for document, place, own in found]


def stored_ranges(rows: Rows, row: int) -> tuple[StoredTokens, np.ndarray, np.ndarray]:
    """The stored ranges [begins[k], ends[k]) whose tokens are `row`, and the corpus that holds them.

    Raises:
        TypeError: rows that are not read from shards.
    """
    if isinstance(rows, MixedRows):
        part = int(rows.turns[row % rows.period])
        return stored_ranges(rows.parts[part], rows.part_row(part, row))
    if isinstance(rows, PackedRows):
        with rows.lock:
            window, place = rows.locate(row)
            begins, ends = rows.segments(window, place, place + 1)
        return rows.corpus, begins, ends
    if isinstance(rows, StreamRows) and isinstance(rows.stream, ShardStream):
        stream, T = rows.stream, rows.seq_len
        parts = [stream.order.segments(*part) for part in by_epoch(rows.begin + row * T, T + 1, stream.epoch_tokens)]
        begins, ends = (np.concatenate(bounds) for bounds in zip(*parts))
        return stream.corpus, begins, ends
    if isinstance(rows, ShuffledRows):
        return rows.stream.corpus, *rows.stored(row, 1)
    raise TypeError(f"rows of the type {type(rows).__name__} are not read from shards")
