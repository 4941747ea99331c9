"""The order `bos`: rows that begin where documents begin, packed window by window. Specified in docs/data-order.md.

The packing is nanochat's (Karpathy 2025, `tokenizing_distributed_data_loader_bos_bestfit`), with a fixed window of
documents in place of its buffer, which a run cannot enter in the middle.
"""

import threading
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from regpt.data.order import EpochTables, permutation, splitmix64
from regpt.data.stream import Corpus, ranges
from regpt.errors import UserError

WINDOW = 1024  # documents, and rows' worth of tokens, that a window holds at least: its unfinished last row is left out


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


class PackedRows:
    """The rows of `corpus` in the order `bos`, epoch after epoch.

    Windows are numbered through all epochs. A row is found by the number of rows before each window, which is known
    for the windows packed so far: reading on packs each window once, and entering at row i packs those before it,
    about a microsecond a document.
    """

    def __init__(self, corpus: Corpus, starts: np.ndarray, seed: int, seq_len: int, *, window: int = WINDOW) -> None:
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
        self.epoch_windows = -(-self.n_documents // self.window_documents)
        self.tables = EpochTables(lambda epoch: permutation(seed, epoch, self.n_documents))
        self.row_ends: list[int] = []  # by window: rows read when it has been
        self.last: tuple[int, Packing] | None = None
        self.lock = threading.RLock()  # a prefetching thread reads, another may ask for the epochs
        if not self.epoch_rows(1):
            raise UserError(
                f"{self.source} has {self.epoch_tokens} tokens, which fill no row of data.seq_len {seq_len} + 1; "
                "set a smaller data.seq_len, or prepare more text"
            )

    def read(self, first: int, count: int) -> np.ndarray:
        bounds = [np.empty((2, 0), np.int64)]
        with self.lock:
            while count:
                window, row = self.locate(first)
                n_rows = min(count, self.packing(window).n_rows - row)
                bounds.append(self.segments(window, row, row + n_rows))
                first, count = first + n_rows, count - n_rows
        begins, ends = np.concatenate(bounds, axis=1)
        return self.corpus.read(begins, ends).reshape(-1, self.seq_len + 1)

    def epoch_rows(self, limit: int) -> int:
        with self.lock:
            while self.rows_before(len(self.row_ends)) < limit and len(self.row_ends) < self.epoch_windows:
                self.pack_next()
            return min(limit, self.rows_before(min(len(self.row_ends), self.epoch_windows)))

    def epochs(self, row: int) -> list[float]:
        with self.lock:
            window, row = self.locate(row)
            epoch, place = divmod(window, self.epoch_windows)
            read = place * self.window_documents + row / self.packing(window).n_rows * len(self.documents(window))
        return [epoch + read / self.n_documents]

    def left_out(self, windows: int | None = None) -> float:
        """The share of the tokens that no row holds: cropped, or in a window's unfinished last row.

        Of the first epoch, or of its first `windows` windows only; the former takes a microsecond a document.
        """
        n_windows = min(windows or self.epoch_windows, self.epoch_windows)
        with self.lock:
            while len(self.row_ends) < n_windows:
                self.pack_next()
            stored = self.epoch_tokens
            if n_windows < self.epoch_windows:
                documents = self.tables.get(0, read=0)[: n_windows * self.window_documents].astype(np.int64)
                stored = int((self.starts[documents + 1] - self.starts[documents]).sum())
            return 1 - self.rows_before(n_windows) * (self.seq_len + 1) / stored

    def segments(self, window: int, begin: int, end: int) -> np.ndarray:
        """(2, segments) int64: begins and ends of the stored ranges that are rows [begin, end) of `window`."""
        packing = self.packing(window)
        epoch, place = divmod(window, self.epoch_windows)
        epoch_seed = int(splitmix64(self.seed, epoch, 1)[0])
        rows = permutation(epoch_seed, place, packing.n_rows)[begin:end].astype(np.int64)  # not the longest text first
        firsts = packing.row_starts[rows]
        placed = ranges(firsts, packing.row_starts[rows + 1] - firsts)
        begins = self.starts[self.documents(window)[packing.documents[placed]]]
        return np.stack([begins, begins + packing.tokens[placed]])

    def locate(self, row: int) -> tuple[int, int]:
        """The window that holds `row`, and the row's number within it. Every epoch has a row, so this ends."""
        while self.rows_before(len(self.row_ends)) <= row:
            self.pack_next()
        window = bisect_right(self.row_ends, row)
        return window, row - self.rows_before(window)

    def pack_next(self) -> None:
        window = len(self.row_ends)
        self.row_ends.append(self.rows_before(window) + self.packing(window).n_rows)

    def rows_before(self, window: int) -> int:
        return self.row_ends[window - 1] if window else 0

    def packing(self, window: int) -> Packing:
        if self.last is None or self.last[0] != window:
            documents = self.documents(window)
            self.last = window, pack(self.starts[documents + 1] - self.starts[documents], self.seq_len + 1)
        return self.last[1]

    def documents(self, window: int) -> np.ndarray:
        """(documents,) int64: the documents of `window`, in the order of its epoch."""
        epoch, place = divmod(window, self.epoch_windows)
        table = self.tables.get(epoch, read=(place + 1) / self.epoch_windows)
        return table[place * self.window_documents : (place + 1) * self.window_documents].astype(np.int64)
