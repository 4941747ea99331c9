"""Rows of T + 1 tokens, numbered from 0 without end: what a batch is made of, in every order."""

from pathlib import Path
from typing import Protocol

import numpy as np

from regpt.data.bos import PackedRows
from regpt.data.manifest import Manifest
from regpt.data.stream import Corpus, TokenStream, document_starts, open_stream
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


def open_rows(folder: Path, manifest: Manifest, split: str, order: str, seed: int, seq_len: int) -> Rows:
    """The rows of one split of `folder`; `seed` matters to `shuffle` and `bos`.

    Raises:
        UsageError: an unknown order.
        UserError: no tokens in the split, too few for a row of `bos`, or an index that does not fit its shard.
    """
    if order not in ORDERS:
        raise UsageError(f"data.order is {order!r}{nearest(order, ORDERS)}; choose from {', '.join(ORDERS)}")
    if order == "bos":
        starts = document_starts(folder, manifest, split)
        return PackedRows(Corpus(folder, manifest, split), starts, seed, seq_len)
    return StreamRows(open_stream(folder, manifest, split, order, seed), seq_len)


class StreamRows:
    """The rows of a stream of tokens: row i is its tokens [i·T, i·T + T + 1)."""

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
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
