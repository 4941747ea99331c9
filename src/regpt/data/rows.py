"""Endless sequences of rows of T + 1 tokens, from which batches are cut, in every order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from regpt.data.bos import PackedRows
from regpt.data.config import ShuffleRows, check_shuffle_rows
from regpt.data.manifest import Manifest
from regpt.data.order import row_key, row_offset, shuffled
from regpt.data.packed import ConversationRows
from regpt.data.stream import ShardStream, Span, StoredTokens, document_starts, open_stream
from regpt.errors import UsageError, UserError, nearest

CONVERSATIONS = ("packed", "grouped")
ORDERS = ("shuffle", "sequential", "bos")  # of text


class Rows(Protocol):
    """An endless sequence of rows. The whole state of reading is the number of the next row.

    Attributes:
        seq_len: T; a row has T + 1 tokens, T inputs and, one place on, T targets.
        source: what is read, for messages.
        epoch_tokens: tokens stored there.
    """

    seq_len: int
    source: str
    epoch_tokens: int

    def read(self, first: int, count: int) -> np.ndarray:
        """(count, T + 1) unsigned integers: rows [first, first + count). A pure function of its arguments."""
        ...

    def epoch_rows(self, limit: int) -> int:
        """Whole rows in the first epoch, counted no further than `limit`."""
        ...

    def epochs(self, row: int) -> list[float]:
        """For each folder, how many times it has been read when rows [0, row) have been."""
        ...

    def cut(self, count: int, seq_len: int) -> "tuple[Rows, Rows]":
        """Split at row `count`, after which rows have another length: these rows, and those of `seq_len` after them."""
        ...


def open_rows(
    folder: Path,
    manifest: Manifest,
    split: str,
    order: str,
    seed: int,
    seq_len: int,
    shuffle_rows: ShuffleRows = "epoch",
    batch_rows: int = 0,
) -> Rows:
    """The rows of one split of `folder`; `seed` matters to all orders but `sequential`, `shuffle_rows` to `shuffle` and
    `bos`, `batch_rows` to `grouped`. Of conversations, `sequential` is packed rows that are not permuted.

    Raises:
        UsageError: an unknown order, or a window of fewer than 2 rows.
        UserError: no tokens in the split, too few for a row of `bos`, an index that does not fit its shard, or
            conversations in an order for text, and text in one for conversations.
    """
    known = (*ORDERS, *CONVERSATIONS)
    if order not in known:
        raise UsageError(f"data.order is {order!r}{nearest(order, known)}; choose from {', '.join(known)}")
    check_shuffle_rows(shuffle_rows)
    if manifest.has_parts and order == "sequential":
        order = "placed"
    if order in (*CONVERSATIONS, "placed"):
        return ConversationRows(folder, manifest, split, order, seed, seq_len, batch_rows)
    if manifest.has_parts:
        raise UserError(
            f"{str(folder)!r} holds conversations, of which only the answers are trained on; set data.order to packed "
            f"or grouped, not {order}"
        )
    if order == "bos":
        starts = document_starts(folder, manifest, split)
        return PackedRows(StoredTokens(folder, manifest, split), starts, seed, seq_len, shuffle_rows)
    stream = open_stream(folder, manifest, split, order, seed)
    if order == "sequential" or shuffle_rows == "none":
        return StreamRows(stream, seq_len)
    return ShuffledRows(stream, seed, seq_len, None if shuffle_rows == "epoch" else int(shuffle_rows))


class StreamRows:
    """The rows of a stream of tokens from token `begin` on: row i is its tokens [begin + i·T, begin + i·T + T + 1)."""

    def __init__(self, stream: ShardStream | Span, seq_len: int, begin: int = 0) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.begin = begin
        self.source = stream.source
        self.epoch_tokens = stream.epoch_tokens

    def read(self, first: int, count: int) -> np.ndarray:
        T = self.seq_len
        tokens = self.stream.tokens(self.begin + first * T, count * T + 1)  # (count·T + 1,)
        return np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]  # each row ends with the next one's first

    def epoch_rows(self, limit: int) -> int:
        return min(limit, self.epoch_tokens // self.seq_len)

    def epochs(self, row: int) -> list[float]:
        return [(self.begin + row * self.seq_len) / self.epoch_tokens]

    def cut(self, count: int, seq_len: int) -> "tuple[StreamRows, StreamRows]":
        return self, StreamRows(self.stream, seq_len, self.begin + count * self.seq_len)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one length on the ring of an epoch, which are permuted among themselves.

    Attributes:
        token: position on the ring of the first row's first token.
        left: unread tokens of the ring from there on.
        block: number in the epoch of its first block of rows.
        n_rows: rows of it that are read.
    """

    epoch: int
    token: int
    left: int
    block: int = 0
    n_rows: int = 0


class ShuffledRows:
    """The rows of a stream, epoch by epoch, in a new order each epoch.

    An epoch's stream of N tokens is read as a ring. Row j is its tokens [o + j·T, o + j·T + T + 1), for
    j < n = ⌊N / T⌋, with an offset o < T of the epoch's own, so that even a corpus of one document is cut into other
    rows each time. The other N mod T tokens are left out of this epoch. Rows are permuted over the epoch, or within
    each `window` rows of it. Rows that follow those of another length begin in an epoch where these ended.
    """

    def __init__(
        self,
        stream: ShardStream,
        seed: int,
        seq_len: int,
        window: int | None,
        begin: Segment | None = None,
        count: int | None = None,
    ) -> None:
        """`begin` is where the rows begin in an epoch (without its `n_rows`), `count` how many are read in all."""
        self.stream, self.seed, self.seq_len, self.given_window = stream, seed, seq_len, window
        self.source, self.epoch_tokens = stream.source, stream.epoch_tokens
        self.n_rows = self.epoch_tokens // seq_len
        self.window = min(window or self.n_rows, self.n_rows)
        self.count = count
        begin = begin or Segment(0, row_offset(seed, 0, seq_len), self.epoch_tokens)
        n_rows = begin.left // seq_len
        self.first = replace(begin, n_rows=n_rows if count is None else min(n_rows, count))

    def read(self, first: int, count: int) -> np.ndarray:
        begins, ends = self.stored(first, count)
        return self.stream.corpus.read(begins, ends).reshape(count, self.seq_len + 1)

    def stored(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return begins and ends of the stored ranges that make up rows [first, first + count)."""
        parts = [self.ranges(segment, begin, end) for segment, begin, end in self.by_segment(first, count)]
        begins, ends = (np.concatenate(bounds) for bounds in zip(*parts))
        return begins, ends

    def by_segment(self, first: int, count: int) -> Iterator[tuple[Segment, int, int]]:
        while count:
            segment, begin = self.locate(first)
            end = min(segment.n_rows, begin + count)
            yield segment, begin, end
            first, count = first + end - begin, count - (end - begin)

    def locate(self, row: int) -> tuple[Segment, int]:
        """Return the segment that holds `row`, and the row's index in it."""
        if row < self.first.n_rows:
            return self.first, row
        epochs, place = divmod(row - self.first.n_rows, self.n_rows)
        epoch, rest = self.first.epoch + 1 + epochs, self.n_rows
        if self.count is not None:
            rest = min(rest, self.count - row + place)
        return Segment(epoch, row_offset(self.seed, epoch, self.seq_len), self.epoch_tokens, n_rows=rest), place

    def ranges(self, segment: Segment, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored ranges that make up rows [begin, end) of `segment`, in reading order."""
        N = self.epoch_tokens
        begins = (self.ring_rows(segment, begin, end) * self.seq_len + segment.token) % N
        ends = begins + self.seq_len + 1
        over = np.flatnonzero(ends > N)  # the row that wraps around the end of the stream
        begins = np.insert(begins, over + 1, 0)
        ends = np.insert(np.minimum(ends, N), over + 1, ends[over] - N)
        return self.stream.order.segments(segment.epoch, begins, ends)

    def ring_rows(self, segment: Segment, begin: int, end: int) -> np.ndarray:
        """Permutation within blocks: (end - begin,) int64, the rows on the ring that are read as rows [begin, end) of
        `segment`."""
        pieces = []
        for block in range(begin // self.window, -(-end // self.window)):
            first = block * self.window
            size = min(self.window, segment.n_rows - first)
            places = np.arange(max(begin - first, 0), min(end - first, size))
            key = row_key(self.seed, segment.epoch, segment.block + block)
            pieces.append(first + shuffled(places, size, key))
        return np.concatenate(pieces)

    def epoch_rows(self, limit: int) -> int:
        return min(limit, self.n_rows)

    def epochs(self, row: int) -> list[float]:
        first = self.first
        before = self.epoch_tokens - first.left
        if not before or row >= first.n_rows:
            return [(row + (first.epoch + 1) * self.n_rows - first.n_rows) / self.n_rows]
        return [first.epoch + (before + row / first.n_rows * first.left) / self.epoch_tokens]

    def cut(self, count: int, seq_len: int) -> "tuple[Self, Self]":
        given = self.stream, self.seed
        ended = type(self)(*given, self.seq_len, self.given_window, self.first, count)
        if not count:  # a part of a mixture of which nothing was read
            return ended, type(self)(*given, seq_len, self.given_window, self.first)
        segment, place = ended.locate(count - 1)
        begin = Segment(
            segment.epoch,
            segment.token + segment.n_rows * self.seq_len,
            segment.left - segment.n_rows * self.seq_len,
            segment.block + -(-segment.n_rows // self.window),
        )
        assert place == segment.n_rows - 1
        return ended, type(self)(*given, seq_len, self.given_window, begin)
