"""Rows of T + 1 tokens, numbered from 0 without end: what a batch is made of, in every order."""

from pathlib import Path
from typing import Protocol

import numpy as np

from regpt.data.bos import PackedRows
from regpt.data.config import ShuffleRows, check_shuffle_rows
from regpt.data.manifest import Manifest
from regpt.data.order import row_key, row_offset, shuffled
from regpt.data.stream import ShardStream, Span, StoredTokens, by_epoch, document_starts, open_stream
from regpt.errors import UsageError, nearest

ORDERS = ("shuffle", "sequential", "bos")


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


def open_rows(
    folder: Path,
    manifest: Manifest,
    split: str,
    order: str,
    seed: int,
    seq_len: int,
    shuffle_rows: ShuffleRows = "epoch",
) -> Rows:
    """The rows of one split of `folder`; `seed` and `shuffle_rows` matter to `shuffle` and `bos`.

    Raises:
        UsageError: an unknown order, or a window of fewer than 2 rows.
        UserError: no tokens in the split, too few for a row of `bos`, or an index that does not fit its shard.
    """
    if order not in ORDERS:
        raise UsageError(f"data.order is {order!r}{nearest(order, ORDERS)}; choose from {', '.join(ORDERS)}")
    check_shuffle_rows(shuffle_rows)
    if order == "bos":
        starts = document_starts(folder, manifest, split)
        return PackedRows(StoredTokens(folder, manifest, split), starts, seed, seq_len, shuffle_rows)
    stream = open_stream(folder, manifest, split, order, seed)
    if order == "sequential" or shuffle_rows == "none":
        return StreamRows(stream, seq_len)
    return ShuffledRows(stream, seed, seq_len, None if shuffle_rows == "epoch" else int(shuffle_rows))


class StreamRows:
    """The rows of a stream of tokens: row i is its tokens [i·T, i·T + T + 1)."""

    def __init__(self, stream: ShardStream | Span, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.source = stream.source
        self.epoch_tokens = stream.epoch_tokens

    def read(self, first: int, count: int) -> np.ndarray:
        T = self.seq_len
        tokens = self.stream.tokens(first * T, count * T + 1)  # (count·T + 1,)
        return np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]  # each row ends with the next one's first

    def epoch_rows(self, limit: int) -> int:
        return min(limit, self.epoch_tokens // self.seq_len)

    def epochs(self, row: int) -> list[float]:
        return [row * self.seq_len / self.epoch_tokens]


class ShuffledRows:
    """The rows of a stream, epoch by epoch, in a new order each epoch.

    An epoch's stream of N tokens is read as a ring. Row j is its tokens [o + j·T, o + j·T + T + 1), for
    j < n = ⌊N / T⌋, with an offset o < T of the epoch's own, so that even a corpus of one document is cut into other
    rows each time. The other N mod T tokens are left out of this epoch. Rows are permuted over the epoch, or within
    each `window` rows of it.
    """

    def __init__(self, stream: ShardStream, seed: int, seq_len: int, window: int | None) -> None:
        self.stream, self.seed, self.seq_len = stream, seed, seq_len
        self.source, self.epoch_tokens = stream.source, stream.epoch_tokens
        self.n_rows = self.epoch_tokens // seq_len
        self.window = min(window or self.n_rows, self.n_rows)

    def read(self, first: int, count: int) -> np.ndarray:
        parts = [self.segments(*part) for part in by_epoch(first, count, self.n_rows)]
        begins, ends = (np.concatenate(bounds) for bounds in zip(*parts))
        return self.stream.corpus.read(begins, ends).reshape(count, self.seq_len + 1)

    def segments(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The stored ranges that are rows [begin, end) of `epoch`, in the order in which they are read."""
        offset = row_offset(self.seed, epoch, self.seq_len)
        begins = self.stream_rows(epoch, begin, end) * self.seq_len + offset
        ends = begins + self.seq_len + 1
        over = np.flatnonzero(ends > self.epoch_tokens)  # the last row of the stream at most
        begins = np.insert(begins, over + 1, 0)
        ends = np.insert(np.minimum(ends, self.epoch_tokens), over + 1, ends[over] - self.epoch_tokens)
        return self.stream.order.segments(epoch, begins, ends)

    def stream_rows(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """(end - begin,) int64: the rows of the epoch's stream that are read as its rows [begin, end)."""
        pieces = []
        for block in range(begin // self.window, -(-end // self.window)):
            first = block * self.window
            size = min(self.window, self.n_rows - first)
            places = np.arange(max(begin - first, 0), min(end - first, size))
            pieces.append(first + shuffled(places, size, row_key(self.seed, epoch, block)))
        return np.concatenate(pieces)

    def epoch_rows(self, limit: int) -> int:
        return min(limit, self.n_rows)

    def epochs(self, row: int) -> list[float]:
        return [row / self.n_rows]
