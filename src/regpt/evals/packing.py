"""Prompts with several endings → rows of tokens that hold each context once. Uses no torch.

A *tree* is a context followed by all its endings in one row. Endings attend to the context and to themselves, but not
to each other, nor to neighbouring trees: token i attends to token j where j ≤ i < ends[j].
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from regpt.data.stream import ranges
from regpt.errors import UserError

ROW_TOKENS = (512, 1024, 2048, 4096, 8192)  # lengths of packed rows: few, since each is compiled anew
# Attention over a whole row costs 4·T·C FLOPs a token and layer, its weights 24·C² (at three times the speed): at this
# many tokens a row of GPT-2 124M has doubled what a token costs. Only the choice of a row's length depends on it.
DOUBLED_AT = 1500


class Prompt(NamedTuple):
    """A context and the endings that may follow it.

    Attributes:
        context: (n,) token ids; empty if the endings share no beginning: then the first tokens of each are its context.
        endings: token ids of each ending, at least one token each.
        scored: for each ending, how many of its last tokens count; the others are context.
    """

    context: np.ndarray
    endings: Sequence[np.ndarray]
    scored: Sequence[int]


class Tree(NamedTuple):
    """A prompt, or a part of its endings, that fits the model; `owners` are the numbers of its endings."""

    context: np.ndarray
    endings: Sequence[np.ndarray]
    scored: Sequence[int]
    owners: Sequence[int]

    @property
    def size(self) -> int:
        """Tokens that the model reads: the last one of an ending is only predicted."""
        return len(self.context) + sum(map(len, self.endings)) - len(self.endings)


class PackedBatch(NamedTuple):
    """Input of one forward pass, int64: B rows of T tokens, and S places where a token is scored.

    Attributes:
        idx, positions: (B, T).
        ends: (B, T), the first token of the row that does not see this one.
        slots: (S,) places in the flattened rows whose hidden states predict `targets`.
        targets: (S,) token ids.
        owners: (S,) numbers of the endings that they belong to.
    """

    idx: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    owners: np.ndarray


class BatchPlan(NamedTuple):
    """A batch before it is filled: the trees of each row, by number, and its shape."""

    rows: Sequence[Sequence[int]]
    n_rows: int
    row_tokens: int


def plant(prompts: Iterable[Prompt], max_seq_len: int) -> list[Tree]:
    """The trees of `prompts`; endings are numbered through all of them.

    Where context and ending together are longer than the model, their last `max_seq_len + 1` tokens are kept (the last
    one is only predicted), as lm-eval does. Endings of one length share the truncated context.

    Raises:
        UserError: more scored tokens than the model has positions.
    """
    trees, owner = [], 0
    for number, (context, endings, scored) in enumerate(prompts):
        room = max_seq_len + 1 - len(context)
        owners = range(owner, owner + len(endings))
        owner += len(endings)
        if max(map(len, endings)) <= room and len(context):
            trees.append(Tree(context, endings, scored, owners))
            continue
        for length, members in group_by_length(endings, room if len(context) else 0).items():
            some = [endings[k] for k in members], [scored[k] for k in members], [owners[k] for k in members]
            kept = context[-max(0, max_seq_len + 1 - length) :] if length < max_seq_len + 1 else context[:0]
            if len(kept):
                trees.append(Tree(kept, *some))
            else:
                trees += [apart(*one, max_seq_len, number) for one in zip(*some)]
    return trees


def is_cut(prompt: Prompt, max_seq_len: int) -> bool:
    """Whether `plant` truncates the context for one of its endings."""
    return len(prompt.context) + max(map(len, prompt.endings)) > max_seq_len + 1


def group_by_length(endings: Sequence[np.ndarray], room: int) -> dict[int, list[int]]:
    """Group the numbers of endings: those that fit into `room` under 0, the others under their length."""
    groups: dict[int, list[int]] = {}
    for k, ending in enumerate(endings):
        groups.setdefault(0 if len(ending) <= room else len(ending), []).append(k)
    return groups


def apart(ending: np.ndarray, scored: int, owner: int, max_seq_len: int, number: int) -> Tree:
    """Return a tree of one ending whose context is its own first tokens."""
    if scored > max_seq_len:
        raise UserError(
            f"item {number} has an ending of {scored:,} tokens, the model reads at most {max_seq_len:,}; shorten it or "
            "use a model with longer sequences"
        )
    kept = ending[-max_seq_len - 1 :]
    return Tree(kept[:-scored], [kept[-scored:]], [scored], [owner])


def bucketed(sizes: np.ndarray, batch_tokens: int) -> list[BatchPlan]:
    """Plan rows of one tree each, the longest first, so that rows of a batch are about equally long.

    Little padding and short attention, but almost every batch has a shape of its own: for computing uncompiled.
    """
    order, plans = np.argsort(-sizes, kind="stable"), []
    while len(order):
        row_tokens = int(sizes[order[0]])
        n_rows = min(len(order), max(1, batch_tokens // row_tokens))
        plans.append(BatchPlan([[tree] for tree in order[:n_rows].tolist()], n_rows, row_tokens))
        order = order[n_rows:]
    return plans


def packed(sizes: np.ndarray, batch_tokens: int) -> list[BatchPlan]:
    """Plan rows filled with many trees, all batches of one shape: for compiled functions."""
    if not len(sizes):
        return []
    longest = int(sizes.max())
    lengths = [T for T in ROW_TOKENS if longest <= T] or [-(-longest // ROW_TOKENS[-1]) * ROW_TOKENS[-1]]
    packings = {T: best_fit(sizes, T) for T in lengths[:3]}
    T = min(packings, key=lambda T: len(packings[T]) * T * (1 + T / DOUBLED_AT))
    rows, B = packings[T], max(1, batch_tokens // T)
    return [BatchPlan(rows[first : first + B], B, T) for first in range(0, len(rows), B)]


def best_fit(sizes: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Pack trees of `sizes` (trees,), each at most `row_tokens`, into few rows: best-fit decreasing, at most 11/9 of
    the fewest rows (Johnson 1974)."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), in order
    smallest = int(sizes.min())
    for tree in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[tree])
        fit = bisect_left(spaces, (size, -1))
        if fit < len(spaces):
            space, row = spaces.pop(fit)
        else:
            space, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(tree)
        if space - size >= smallest:
            insort(spaces, (space - size, row))
    return rows


def fill(plan: BatchPlan, trees: Sequence[Tree]) -> PackedBatch:
    """Fill a planned batch with tokens. Padding is token 0 at position 0, which attends only to itself."""
    B, T = plan.n_rows, plan.row_tokens
    pieces, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    segments = []  # start in the flattened rows, tokens, position of the first, end of what sees them
    places = []  # first slot, scored tokens, last token of the context, whether the first slot is that, owner
    for row, numbers in enumerate(plan.rows):
        at = row * T
        for context, endings, scored, owners in map(trees.__getitem__, numbers):
            n, tree = len(context), len(segments)
            pieces.append(context)
            segments.append((at, n, 0, 0))
            at += n
            last = at - 1
            for ending, count, owner in zip(endings, scored, owners):
                length = len(ending) - 1
                pieces.append(ending[:-1])
                targets.append(ending[length + 1 - count :])
                segments.append((at, length, n, at + length))
                places.append((at + length - count, count, last, count > length, owner))
                at += length
            segments[tree] = (*segments[tree][:3], at)  # everything that follows in the tree
    starts, lengths, firsts, ends = np.array(segments, dtype=np.int64).reshape(-1, 4).T
    where = ranges(starts, lengths)
    idx, positions = np.zeros((2, B * T), dtype=np.int64)
    seen_until = np.arange(1, B * T + 1)
    idx[where] = np.concatenate(pieces)
    positions[where] = ranges(firsts, lengths)
    seen_until[where] = np.repeat(ends, lengths)
    first, counts, last, at_context, owner = np.array(places, dtype=np.int64).reshape(-1, 5).T
    slots = ranges(first, counts)
    begins, whole = np.cumsum(counts) - counts, at_context.astype(bool)
    slots[begins[whole]] = last[whole]  # the context's last token predicts every ending's first
    row_starts = np.arange(B)[:, None] * T
    return PackedBatch(
        idx.reshape(B, T),
        positions.reshape(B, T),
        seen_until.reshape(B, T) - row_starts,
        slots,
        np.concatenate(targets).astype(np.int64),
        np.repeat(owner, counts),
    )
