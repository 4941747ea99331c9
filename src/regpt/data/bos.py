"""The order `bos`: rows that begin where documents begin, packed window by window. Specified in docs/data-order.md.

The packing is nanochat's (Karpathy 2025, `tokenizing_distributed_data_loader_bos_bestfit`), with a fixed window of
documents in place of its buffer, which a run cannot enter in the middle.
"""

import functools
import threading
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from regpt.data.config import ShuffleRows
from regpt.data.order import permutation, ranges, row_key, shuffled, splitmix64
from regpt.data.stream import StoredTokens
from regpt.errors import UsageError, UserError

WINDOW = 1024  # documents, and rows' worth of tokens, that a window holds at least: its unfinished last row is left out
BLOCK = 1 << 18  # documents whose rows are permuted together: packing them takes about a quarter of a second


@dataclass(frozen=True)
class Packing:
    """The rows of one window, all of them full.

    Attributes:
        documents: (placed,) int64, places in the window of the documents, row after row and from left to right.
        tokens: (placed,) int64, how many tokens of each are taken, from its beginning.
        row_starts: (rows + 1,) int64; row r holds documents[row_starts[r] : row_starts[r + 1]].
    """

    documents: np.ndarray
    tokens: np.ndarray
    row_starts: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1


def pack(lengths: np.ndarray, row_tokens: int) -> Packing:
    """Best fit: documents of `lengths` (documents,) int64, each at least 1, into rows of `row_tokens`.

    A row takes the longest document that fits into what is left of it, again and again; when none fits, the shortest,
    cropped. Documents longer than a row count as long as a row. A row that the documents do not fill is left out.
    O(documents log documents): about a millisecond for a thousand documents.
    """
    sizes = np.minimum(lengths, row_tokens)
    by_size = np.argsort(sizes, kind="stable")  # of documents of one size, the first in the window is taken first
    shelf, first, count = (x.tolist() for x in np.unique(sizes[by_size], return_index=True, return_counts=True))
    taken, left = dict(zip(shelf, first)), dict(zip(shelf, count))  # by size: next place on by_size, documents left
    runs: list[tuple[int, int, int]] = []  # of equal documents: first place on by_size, documents, tokens of each
    row_ends = [0]  # in runs
    space = row_tokens
    while shelf:
        fit = bisect_right(shelf, space) - 1
        if fit >= 0:
            tokens = size = shelf[fit]
            n = min(left[size], space // size)  # while it fits, the same size stays the longest that does
        else:
            fit, size, tokens, n = 0, shelf[0], space, 1
        runs.append((taken[size], n, tokens))
        taken[size] += n
        left[size] -= n
        if not left[size]:
            del shelf[fit]
        space -= n * tokens
        if not space:
            row_ends.append(len(runs))
            space = row_tokens
    places, n_equal, tokens = np.array(runs[: row_ends[-1]], dtype=np.int64).reshape(-1, 3).T
    documents = by_size[ranges(places, n_equal)]
    return Packing(documents, np.repeat(tokens, n_equal), np.cumsum([0, *n_equal])[row_ends])


def pack_windows(lengths: np.ndarray, row_tokens: int, window: int) -> Packing:
    """`pack` of each `window` documents by themselves, as one."""
    packed = [pack(lengths[first : first + window], row_tokens) for first in range(0, len(lengths), window)]
    if len(packed) == 1:
        return packed[0]
    placed = np.cumsum([0, *(len(one.documents) for one in packed)])
    documents = [one.documents + k * window for k, one in enumerate(packed)]
    row_starts = [one.row_starts[:-1] + placed[k] for k, one in enumerate(packed)]
    tokens = [one.tokens for one in packed]
    return Packing(np.concatenate(documents), np.concatenate(tokens), np.concatenate([*row_starts, placed[-1:]]))


class PackedRows:
    """The rows of `corpus` in the order `bos`, epoch after epoch.

    A block is some windows whose rows are permuted together. Blocks are numbered through all epochs. A row is found by
    the number of rows before each block, which is known for the blocks packed so far: reading on packs each block once,
    and entering at row i packs those before it, about a microsecond a document.
    """

    def __init__(
        self,
        corpus: StoredTokens,
        starts: np.ndarray,
        seed: int,
        seq_len: int,
        shuffle_rows: ShuffleRows = "epoch",
        *,
        window: int = WINDOW,
    ) -> None:
        """`starts` (documents + 1,) int64: where each document begins; the last entry is the number of tokens.

        Raises:
            UserError: the documents fill no row.
        """
        self.corpus, self.starts, self.seed = corpus, starts, seed
        self.seq_len = seq_len
        self.source = corpus.source
        self.n_documents, self.epoch_tokens = len(starts) - 1, int(starts[-1])
        rows_worth = -(-window * (seq_len + 1) * self.n_documents // self.epoch_tokens)  # documents, rounded up
        self.window_documents = max(window, rows_worth)
        self.keyed = shuffle_rows != "none"
        self.block_documents = self.window_documents * self.block_windows(shuffle_rows, window)
        self.epoch_blocks = -(-self.n_documents // self.block_documents)
        self.table = functools.lru_cache(maxsize=1)(lambda epoch: permutation(seed, epoch, self.n_documents))
        self.row_ends: list[int] = []  # by block: rows read when it has been
        self.last: tuple[int, Packing] | None = None
        self.lock = threading.RLock()  # a prefetching thread reads, another may ask for the epochs
        if not self.epoch_rows(1):
            raise UserError(
                f"{self.source} has {self.epoch_tokens} tokens, which fill no row of data.seq_len {seq_len} + 1; "
                "set a smaller data.seq_len, or prepare more text"
            )

    def block_windows(self, shuffle_rows: ShuffleRows, window: int) -> int:
        """Windows in a block: one, as many as `BLOCK` documents fill, or those of so many rows, of `window` each."""
        if shuffle_rows == "none":
            return 1
        most = max(1, BLOCK // self.window_documents)
        return most if shuffle_rows == "epoch" else min(most, -(-int(shuffle_rows) // window))

    def read(self, first: int, count: int) -> np.ndarray:
        bounds = [np.empty((2, 0), np.int64)]
        with self.lock:
            while count:
                block, row = self.locate(first)
                n_rows = min(count, self.packing(block).n_rows - row)
                bounds.append(self.segments(block, row, row + n_rows))
                first, count = first + n_rows, count - n_rows
        begins, ends = np.concatenate(bounds, axis=1)
        return self.corpus.read(begins, ends).reshape(-1, self.seq_len + 1)

    def epoch_rows(self, limit: int) -> int:
        with self.lock:
            while self.rows_before(len(self.row_ends)) < limit and len(self.row_ends) < self.epoch_blocks:
                self.pack_next()
            return min(limit, self.rows_before(min(len(self.row_ends), self.epoch_blocks)))

    def epochs(self, row: int) -> list[float]:
        with self.lock:
            block, row = self.locate(row)
            epoch, place = divmod(block, self.epoch_blocks)
            read = place * self.block_documents + row / self.packing(block).n_rows * len(self.documents(block))
        return [epoch + read / self.n_documents]

    def cut(self, count: int, seq_len: int) -> "tuple[PackedRows, PackedRows]":
        """Raise a UsageError: rows of another length are packed from other windows of documents."""
        raise UsageError(
            f"data.order is bos, whose rows of {self.seq_len} tokens cannot be followed by rows of {seq_len} without "
            "leaving out documents; set data.order to shuffle, or one seq_len in train.batch_ramp"
        )

    def left_out(self, windows: int | None = None) -> float:
        """The share of the tokens that no row holds: cropped, or in a window's unfinished last row.

        Of the first epoch, or of its first `windows` windows only (rounded up to whole blocks); the former takes a
        microsecond a document.
        """
        n_blocks = self.epoch_blocks
        if windows:
            n_blocks = min(n_blocks, -(-windows * self.window_documents // self.block_documents))
        with self.lock:
            while len(self.row_ends) < n_blocks:
                self.pack_next()
            stored = self.epoch_tokens
            if n_blocks < self.epoch_blocks:
                documents = self.table(0)[: n_blocks * self.block_documents].astype(np.int64)
                stored = int((self.starts[documents + 1] - self.starts[documents]).sum())
            return 1 - self.rows_before(n_blocks) * (self.seq_len + 1) / stored

    def segments(self, block: int, begin: int, end: int) -> np.ndarray:
        """(2, segments) int64: begins and ends of the stored ranges that are rows [begin, end) of `block`."""
        packing = self.packing(block)
        rows = self.packed_rows(block, packing.n_rows, begin, end)
        firsts = packing.row_starts[rows]
        placed = ranges(firsts, packing.row_starts[rows + 1] - firsts)
        begins = self.starts[self.documents(block)[packing.documents[placed]]]
        return np.stack([begins, begins + packing.tokens[placed]])

    def packed_rows(self, block: int, n_rows: int, begin: int, end: int) -> np.ndarray:
        """(end - begin,) int64: the packed rows that are read as rows [begin, end); not the longest text first."""
        epoch, place = divmod(block, self.epoch_blocks)
        if self.keyed:
            return shuffled(np.arange(begin, end), n_rows, row_key(self.seed, epoch, place))
        epoch_seed = int(splitmix64(self.seed, epoch, 1)[0])
        return permutation(epoch_seed, place, n_rows)[begin:end].astype(np.int64)

    def locate(self, row: int) -> tuple[int, int]:
        """The block that holds `row`, and the row's number within it. Every epoch has a row, so this ends."""
        while self.rows_before(len(self.row_ends)) <= row:
            self.pack_next()
        block = bisect_right(self.row_ends, row)
        return block, row - self.rows_before(block)

    def pack_next(self) -> None:
        block = len(self.row_ends)
        self.row_ends.append(self.rows_before(block) + self.packing(block).n_rows)

    def rows_before(self, block: int) -> int:
        return self.row_ends[block - 1] if block else 0

    def packing(self, block: int) -> Packing:
        if self.last is None or self.last[0] != block:
            documents = self.documents(block)
            lengths = self.starts[documents + 1] - self.starts[documents]
            self.last = block, pack_windows(lengths, self.seq_len + 1, self.window_documents)
        return self.last[1]

    def documents(self, block: int) -> np.ndarray:
        """(documents,) int64: the documents of `block`, in the order of its epoch."""
        epoch, place = divmod(block, self.epoch_blocks)
        return self.table(epoch)[place * self.block_documents : (place + 1) * self.block_documents].astype(np.int64)
