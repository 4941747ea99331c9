"""A split as one endless stream of tokens, read from memory-mapped shards."""

import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from regpt.data.manifest import Manifest, Shard
from regpt.data.order import Sequential, Shuffle, ranges
from regpt.errors import UserError


def open_stream(folder: Path, manifest: Manifest, split: str, order: str, seed: int) -> "ShardStream":
    """The stream of one split of `folder`, in the order `shuffle` with its `seed`, or `sequential`.

    Raises:
        UserError: no tokens in the split, or an index that does not fit its shard.
    """
    assert order in ("shuffle", "sequential")
    positions = Sequential() if order == "sequential" else Shuffle(document_starts(folder, manifest, split), seed)
    return ShardStream(StoredTokens(folder, manifest, split), positions)


class ShardStream:
    """An endless stream of tokens: epoch 0, epoch 1, …, each a complete reading of `corpus` in `order`.

    Attributes:
        source: what is read, for messages.
        epoch_tokens: tokens in one epoch.
    """

    def __init__(self, corpus: "StoredTokens", order: Sequential | Shuffle) -> None:
        self.corpus = corpus
        self.order = order
        self.source = corpus.source
        self.epoch_tokens = corpus.n_tokens

    def tokens(self, start: int, count: int) -> np.ndarray:
        """(count,) unsigned integers: tokens [start, start + count). A pure function of its arguments.

        Raises:
            UserError: a token id outside the vocabulary.
        """
        parts = [self.order.segments(*part) for part in by_epoch(start, count, self.epoch_tokens)]
        if not parts:
            return self.corpus.read(np.empty(0, np.int64), np.empty(0, np.int64))
        begins, ends = (np.concatenate(bounds) for bounds in zip(*parts))
        return self.corpus.read(begins, ends)


class Span:
    """Tokens [begin, end) of a stream's first epoch, as a stream of their own that is read once, not over and over."""

    def __init__(self, stream: ShardStream, begin: int, end: int) -> None:
        self.stream, self.begin = stream, begin
        self.source = f"tokens {begin:,} to {end:,} of {stream.source}"
        self.epoch_tokens = end - begin

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens after the end are the stream's; a caller leaves out their rows."""
        return self.stream.tokens(self.begin + start, count)


def by_epoch(start: int, count: int, epoch_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Stream positions [start, start + count) as (epoch, begin, end), positions counted within the epoch."""
    assert start >= 0
    stop = start + count
    while start < stop:
        epoch, begin = divmod(start, epoch_tokens)
        end = min(epoch_tokens, begin + stop - start)
        yield epoch, begin, end
        start += end - begin


class StoredTokens:
    """The shards of a split, memory-mapped, addressed as one array of `n_tokens` stored tokens.

    Every shard stays mapped and holds a file descriptor: above a thousand shards or so (100 billion tokens at the
    default shard size) a system's limit on open files may have to be raised.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        shards = filled_shards(folder, manifest, split)
        self.source = f"split {split!r} of {str(folder)!r}"
        self.folder, self.manifest, self.split = folder, manifest, split
        self.vocab_size = manifest.vocab_size
        self.dtype = manifest.numpy_dtype
        self.files = [map_file(folder / shard.file) for shard in shards]
        self.sizes = [shard.tokens * self.dtype.itemsize for shard in shards]
        self.names = [shard.file for shard in shards]
        self.maps = [np.frombuffer(file, self.dtype) for file in self.files]  # slices cost a third of np.memmap's
        self.offsets = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)  # (shards + 1,)
        self.n_tokens = int(self.offsets[-1])

    @cached_property
    def starts(self) -> np.ndarray:
        """`document_starts` of the split, read when it is first asked for."""
        return document_starts(self.folder, self.manifest, self.split)

    def read(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The tokens of the stored ranges [begins[k], ends[k]), in order, in one array of `dtype`.

        Raises:
            UserError: a token id outside the vocabulary, or a shard that has become shorter.
        """
        shard, lower, upper = self.pieces(begins, ends)
        self.check_sizes(shard)
        views = [self.maps[k][i:j] for k, i, j in zip(shard.tolist(), lower.tolist(), upper.tolist())]
        tokens = np.concatenate([np.empty(0, self.dtype), *views])  # half a microsecond a piece
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.source} holds token {tokens.max()}, the vocabulary ends at {self.vocab_size - 1}; "
                f"find the changed shard with regpt data verify, or prepare the folder again"
            )
        return tokens

    def check_sizes(self, shard: np.ndarray) -> None:
        """Raise a UserError for one of these shards that was cut since it was opened: to read after the end of a file
        that is mapped ends the process with SIGBUS. A microsecond a shard; a cut during a read is still possible."""
        for k in np.flatnonzero(np.bincount(shard)).tolist():
            if self.files[k].size() < self.sizes[k]:
                raise UserError(
                    f"shard {self.folder / self.names[k]} has been cut to {self.files[k].size():,} of "
                    f"{self.sizes[k]:,} bytes while it was read; restore the file or prepare the folder again"
                )

    def pieces(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stored ranges cut where they cross into another shard: (shard, lower, upper), positions in the shard."""
        first = np.searchsorted(self.offsets, begins, side="right") - 1
        last = np.searchsorted(self.offsets, ends, side="left") - 1
        parts = last - first + 1  # 1 but for the few documents that continue in the next shard
        segment = np.repeat(np.arange(len(begins)), parts)
        shard = ranges(first, parts)
        offset = self.offsets[shard]
        lower = np.maximum(begins[segment], offset) - offset
        upper = np.minimum(ends[segment], self.offsets[shard + 1]) - offset
        return shard, lower, upper


def map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> UserError:
    what = "restore the file" if isinstance(error, FileNotFoundError) else "check its permissions and ulimit -n"
    return UserError(f"shard {path} cannot be opened ({error.strerror}); {what}")


def filled_shards(folder: Path, manifest: Manifest, split: str) -> list[Shard]:
    """The shards of a split; a UserError when they hold no token."""
    shards = [shard for shard in manifest.split(split) if shard.tokens]
    if not shards:
        how = "prepare the text again with --val or another --val-fraction than 0, or take a folder that held out some"
        how = how if split == "val" else "prepare it from more text"
        raise UserError(f"data folder {str(folder)!r} has no tokens in split {split!r}; {how}")
    return shards


def document_starts(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """(documents + 1,) int64: where each document begins in the split; the last entry is the number of tokens.

    An index lists only the documents that start in its shard, so one that continues from the shard before needs no
    special case: it ends where the next document starts.

    Raises:
        UserError: no tokens in the split, an index whose starts do not increase or lie outside its shard, or a split
            that does not begin with a document.
    """
    shards = filled_shards(folder, manifest, split)
    starts = np.empty(sum(shard.documents for shard in shards) + 1, dtype=np.int64)
    filled, offset = 0, 0
    for shard in shards:
        path = folder / shard.idx_file
        try:
            local = np.fromfile(path, dtype="<i8")
        except OSError as error:
            raise unreadable(path, error) from None
        inside = len(local) == 0 or (local[0] >= 0 and local[-1] < shard.tokens)
        if len(local) != shard.documents or not inside or not (local[1:] > local[:-1]).all():
            raise UserError(f"index {path} does not fit its shard; prepare the folder again or restore the file")
        np.add(local, offset, out=starts[filled : filled + len(local)])
        filled, offset = filled + len(local), offset + shard.tokens
    starts[-1] = offset
    if starts[0] != 0:
        raise UserError(f"index {folder / shards[0].idx_file} does not begin with a document; prepare the folder again")
    return starts
