"""The orders `packed` and `grouped`: rows of whole conversations, of which only the answers are targets.

Specified in docs/data-order.md.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regpt.console.text import counted
from regpt.data.manifest import Manifest, Shard
from regpt.data.order import permutation, ranges, row_key, shuffled
from regpt.data.stream import StoredTokens, document_starts
from regpt.errors import UsageError, UserError
from regpt.files import file_sha256, is_file
from regpt.model.ops import IGNORE_INDEX
from regpt.structured import read_object

REFERENCE = "reference.json"  # SHA-256 of the reference's weights and of their log-probabilities
RESTORE = "restore it, or begin the run again"
ALIGNMENT = 64  # tokens: `grouped` pads rows to a multiple, so that a compiled step sees few shapes


def pack_whole(lengths: np.ndarray, row_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: each document goes into the row that it leaves the least space in, none is cut.

    Args:
        lengths: (documents,) int64, from 1 to `row_tokens`.
        seed: orders documents of one length.

    Returns:
        The documents, row after row and from left to right, (documents,) int64; where rows begin in them,
        (rows + 1,) int64. O(documents · (log documents + row_tokens)).
    """
    assert len(lengths)
    assert lengths.min() >= 1
    assert lengths.max() <= row_tokens
    order = permutation(seed, 0, len(lengths)).astype(np.int64)
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # space left → rows that have it
    spaces: list[int] = []  # the keys, ascending
    for document, length in zip(order.tolist(), lengths[order].tolist()):
        place = bisect_left(spaces, length)
        if place == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, row_tokens
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(document)
        left = space - length
        if left:
            if left not in with_space:
                with_space[left] = []
                insort(spaces, left)
            with_space[left].append(row)
    return np.array([d for row in rows for d in row], dtype=np.int64), np.cumsum([0, *map(len, rows)])


def group_by_length(lengths: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One document a row, rows of like length together; as `pack_whole` returns it."""
    order = permutation(seed, 0, len(lengths)).astype(np.int64)
    return order[np.argsort(-lengths[order], kind="stable")], np.arange(len(lengths) + 1)


class ConversationRows:
    """Endless rows of a split of conversations: placed once, permuted anew each epoch.

    Row i is row `shuffled(i mod N)` of the N placed ones, for epoch ⌊i / N⌋. With `group` rows together in a batch
    (`grouped`), neighbours of like length stay together and the groups are permuted.

    Attributes:
        parts: (tokens,) uint8, of every stored token.
        n_rows: N, in each epoch.
        paired: two documents each, a chosen and a rejected answer, stay next to each other in a row.
        reference: (documents,) float32, log-probabilities of the answers of pairs under the reference model.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, split: str, order: str, seed: int, seq_len: int, group: int = 0
    ) -> None:
        """`group` rows are a batch of `grouped`; validation, in the order `placed`, permutes nothing.

        Raises:
            UserError: no conversations, or one longer than a row.
        """
        if not manifest.has_parts:
            raise UserError(
                f"data.order {order} is for conversations, and {str(folder)!r} holds plain text; make them with "
                "regpt finetune, or set data.order to shuffle"
            )
        self.corpus = StoredTokens(folder, manifest, split)
        self.starts = document_starts(folder, manifest, split)
        self.parts = read_parts(folder, [shard for shard in manifest.split(split) if shard.tokens])
        self.source, self.epoch_tokens = self.corpus.source, self.corpus.n_tokens
        self.seed, self.seq_len, self.eot, self.order = seed, seq_len, manifest.eot, order
        self.lengths = np.diff(self.starts)
        self.paired = bool(manifest.options.get("pairs"))
        whole = self.lengths.reshape(-1, 2).sum(axis=1) if self.paired else self.lengths  # of what stays in one row
        longest, what = int(whole.argmax()), "pair" if self.paired else "conversation"
        if whole[longest] > seq_len:
            raise UserError(
                f"{what} {longest} of {self.source} has {whole[longest]:,} tokens, data.seq_len is {seq_len}; set it "
                f"to {whole[longest]} or more, or make the data again with --on-error skip"
            )
        place = group_by_length(whole, seed) if order == "grouped" else pack_whole(whole, seq_len, seed)
        placed, self.row_starts = place
        self.documents = placed
        if self.paired:
            self.documents, self.row_starts = np.repeat(2 * placed, 2), 2 * self.row_starts
            self.documents[1::2] += 1
        self.n_rows = len(self.row_starts) - 1
        self.reference = read_reference(folder, split, len(self.starts) - 1) if self.paired else None
        self.group = max(1, min(group, self.n_rows)) if order == "grouped" else 1

    def placed_rows(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: the placed rows that are read as rows [first, first + count)."""
        epochs, places = np.divmod(np.arange(first, first + count), self.n_rows)
        if self.order == "placed":
            return places
        found = np.empty(count, dtype=np.int64)
        whole = self.n_rows // self.group  # groups; the rows after the last one are read last
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            groups, inside = np.divmod(places[own], self.group)
            moved = groups.copy()
            full = groups < whole
            moved[full] = shuffled(groups[full], whole, row_key(self.seed, epoch, 0))
            found[own] = moved * self.group + inside
        return found

    def layout(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rows [first, first + count): the documents in them, the index of the row of each, and where in the row it
        begins; each (documents,) int64."""
        rows = self.placed_rows(first, count)
        firsts, counts = self.row_starts[rows], self.row_starts[rows + 1] - self.row_starts[rows]
        documents = self.documents[ranges(firsts, counts)]
        row = np.repeat(np.arange(count), counts)
        ends = np.cumsum(self.lengths[documents])
        before = np.concatenate(([0], ends))[np.cumsum(counts) - counts]  # tokens of the rows before
        return documents, row, ends - self.lengths[documents] - before[row]

    def read_batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows [first, first + count) as idx, targets, parts (count, T) and starts (count, T) bool.

        A target is the next token of the same conversation where that is trained on, else IGNORE_INDEX. A row's end
        without a conversation is filled with the end-of-text token, as a document of its own without targets.
        """
        documents, row, offset = self.layout(first, count)
        lengths = self.lengths[documents]
        T = self.seq_len
        if self.order == "grouped":
            T = min(T, -(-int(lengths.max()) // ALIGNMENT) * ALIGNMENT)
        tokens = self.corpus.read(self.starts[documents], self.starts[documents + 1]).astype(np.int64)
        own = self.parts[ranges(self.starts[documents], lengths)]
        targets = np.full(len(tokens), IGNORE_INDEX)
        trained = np.flatnonzero(own[1:])  # a conversation's first token never is
        targets[trained] = tokens[trained + 1]
        places = ranges(row * T + offset, lengths)
        idx = np.full(count * T, self.eot)
        all_targets, parts = np.full(count * T, IGNORE_INDEX), np.zeros(count * T, dtype=np.uint8)
        starts = np.zeros(count * T, dtype=bool)
        idx[places], all_targets[places], parts[places] = tokens, targets, own
        starts[row * T + offset] = True
        filled = np.zeros(count, dtype=np.int64)
        np.add.at(filled, row, lengths)
        starts[(np.arange(count) * T + filled)[filled < T]] = True
        shape = (count, T)
        return idx.reshape(shape), all_targets.reshape(shape), parts.reshape(shape), starts.reshape(shape)

    def read_pairs(self, first: int, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`pairs` and `reference` of `Batch` (zeros without one), P as many as `count` rows can have: a compiled step
        sees one shape. `starts` (count, T) bool are where documents begin in the batch."""
        count, T = starts.shape
        documents, row, offset = self.layout(first, count)
        at = np.searchsorted(np.flatnonzero(starts), row * T + offset).reshape(-1, 2)
        pairs = np.full((count * int(np.diff(self.row_starts).max()) // 2, 2), -1)
        reference = np.zeros(pairs.shape, dtype=np.float32)
        pairs[: len(at)] = at
        if self.reference is not None:
            reference[: len(at)] = self.reference[documents].reshape(-1, 2)
        return pairs, reference

    def read(self, first: int, count: int) -> np.ndarray:
        """(count, T + 1): the tokens of rows, for those that only look at them; batches come from `read_batch`."""
        idx = self.read_batch(first, count)[0]
        return np.pad(idx, ((0, 0), (0, 1)), constant_values=self.eot)

    def epoch_rows(self, limit: int) -> int:
        return min(limit, self.n_rows)

    def epochs(self, row: int) -> list[float]:
        return [row / self.n_rows]

    def cut(self, count: int, seq_len: int) -> "tuple[ConversationRows, ConversationRows]":
        """Raise a UsageError: rows of another length are other rows."""
        raise UsageError(
            f"data.order is {self.order}, whose rows of {self.seq_len} tokens cannot be followed by rows of {seq_len}; "
            "leave out train.batch_ramp, or give it one seq_len"
        )

    def shares(self) -> tuple[int, int, int]:
        """Tokens that are trained on, tokens, and places in the rows of an epoch."""
        if self.order == "grouped":
            sizes = -(-self.lengths // ALIGNMENT) * ALIGNMENT
            return int(np.count_nonzero(self.parts)), self.epoch_tokens, int(np.minimum(sizes, self.seq_len).sum())
        return int(np.count_nonzero(self.parts)), self.epoch_tokens, self.n_rows * self.seq_len

    def sentence(self) -> str:
        """What the rows hold, for people: `… tokens are trained on (35 %)`."""
        trained, tokens, places = self.shares()
        rows = f"{counted(self.n_rows, 'row')} of {self.seq_len:,} tokens" if self.order != "grouped" else "a row each"
        read = counted(len(self.lengths), "conversation")
        return (
            f"{read} in {rows}, {1 - tokens / places:.1%} padding; {trained:,} of "
            f"{tokens:,} tokens are trained on ({trained / tokens:.0%})"
        )


def reference_file(folder: Path, split: str) -> Path:
    """Of a split of pairs: log-probabilities of its answers under the reference model, float32, a document each."""
    return folder / f"{split}-00000.reference"


def read_reference(folder: Path, split: str, documents: int) -> np.ndarray | None:
    """(documents,) float32: what `reference_file` holds; None where it is not there.

    Raises:
        UserError: it is not what was written.
    """
    path = reference_file(folder, split)
    if not path.is_file():
        return None
    known = read_object(folder / REFERENCE, RESTORE).get(path.name) if is_file(folder / REFERENCE) else None
    if known != file_sha256(path):
        raise UserError(f"{path} is not the file that {REFERENCE} next to it describes; {RESTORE}")
    found = np.fromfile(path, dtype="<f4")
    assert len(found) == documents
    return found


def read_parts(folder: Path, shards: Sequence[Shard]) -> np.ndarray:
    try:
        return np.concatenate([np.fromfile(folder / shard.parts_file, dtype=np.uint8) for shard in shards])
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); restore its files") from None
