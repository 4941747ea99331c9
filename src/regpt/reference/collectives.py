"""Many ranks on one page: collectives step by step, and data, tensor, sequence and pipeline parallelism, in NumPy.

A rank is an entry of a list, a message an assignment between entries. n ranks; B rows, C and F columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from regpt.reference.gpt2 import Array, gelu, gelu_backward

Ranks = list[Array]


class Counted(NamedTuple):
    """What a collective gave each rank, and the numbers that the busiest rank sent."""

    values: Ranks
    sent: int


# ---- collectives -----------------------------------------------------------------------------------------------------


def ring_reduce_scatter(values: Sequence[Array]) -> Counted:
    """Rank r ends with the r-th of n parts of the sum. In each of n - 1 rounds every rank sends one part to its right
    neighbour, who adds it to its own: after them each part has passed all ranks (Patarasu & Yuan 2009)."""
    n = len(values)
    parts = [[part.copy() for part in np.array_split(value, n)] for value in values]
    sent = [0] * n
    for round_ in range(n - 1):
        # All messages leave before any arrives; a part starts right of the rank where it will end.
        moving = [(r, (r - 1 - round_) % n) for r in range(n)]
        messages = [(r, number, parts[r][number]) for r, number in moving]
        for r, number, part in messages:
            parts[(r + 1) % n][number] = parts[(r + 1) % n][number] + part
            sent[r] += part.size
    return Counted([parts[r][r] for r in range(n)], max(sent))


def ring_all_gather(parts: Sequence[Array]) -> Counted:
    """Every rank ends with all parts, in order: n - 1 rounds in which each passes on what it got last."""
    n = len(parts)
    known: list[dict[int, Array]] = [{r: part} for r, part in enumerate(parts)]
    sent = [0] * n
    for round_ in range(n - 1):
        messages = [(r, (r - round_) % n, known[r][(r - round_) % n]) for r in range(n)]
        for r, number, part in messages:
            known[(r + 1) % n][number] = part
            sent[r] += part.size
    return Counted([np.concatenate([one[i] for i in range(n)]) for one in known], max(sent))


def ring_all_reduce(values: Sequence[Array]) -> Counted:
    """The sum on every rank: reduce-scatter, then all-gather. Each rank sends 2·(n - 1)/n of the array, hardly more for
    a thousand ranks than for ten; the number of rounds grows with n, and with it what latency costs. Rank and part fix
    the order of the additions, so all ranks hold the same bits."""
    scattered = ring_reduce_scatter(values)
    gathered = ring_all_gather(scattered.values)
    return Counted(gathered.values, scattered.sent + gathered.sent)


# ---- data ------------------------------------------------------------------------------------------------------------


def data_parallel(sums: Sequence[Array], counts: Sequence[int]) -> Ranks:
    """Gradient on every rank: the sum of all ranks' sums over the sum of their counts. The mean of the ranks' means,
    which DistributedDataParallel computes, is another number wherever the counts differ."""
    total = sum(counts)
    return [value / total for value in ring_all_reduce(sums).values]


# ---- tensor and sequence ---------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """An MLP y = gelu(x·upᵀ)·downᵀ over n ranks (Shoeybi et al. 2019, section 3): rank r has rows of `up` (F/n, C) and
    the same columns of `down` (C, F/n), so that gelu needs nothing from the others."""

    up: Ranks
    down: Ranks


def split_mlp(up: Array, down: Array, n: int) -> Split:
    return Split(np.split(up, n), np.split(down, n, axis=1))


def tensor_parallel(x: Array, w: Split) -> tuple[Ranks, list[tuple[Array, ...]]]:
    """y (B, C) on every rank; x (B, C) is on all. Each computes a term of the sum over F: one all-reduce forward."""
    terms, saved = [], []
    for up, down in zip(*w):
        hidden, saved_gelu = gelu(x @ up.T)  # (B, F/n)
        terms.append(hidden @ down.T)
        saved.append((x, up, down, hidden, saved_gelu))
    return [total.reshape(x.shape) for total in ring_all_reduce([term.ravel() for term in terms]).values], saved


def tensor_parallel_backward(dy: Array, saved: list[tuple[Array, ...]]) -> tuple[Ranks, Split]:
    """dx on every rank and each rank's own weight gradients. x was copied to all ranks, so dx is the sum of theirs: one
    all-reduce backward, where the forward's has none to do."""
    terms, dups, ddowns = [], [], []
    for x, up, down, hidden, saved_gelu in saved:
        dpre = gelu_backward(dy @ down, tuple(saved_gelu))
        terms.append(dpre @ up)
        dups.append(dpre.T @ x)
        ddowns.append(dy.T @ hidden)
    dx = [total.reshape(dy.shape) for total in ring_all_reduce([term.ravel() for term in terms]).values]
    return dx, Split(dups, ddowns)


def sequence_parallel(parts: Sequence[Array], w: Split) -> Counted:
    """The same MLP with x and y cut along the rows (Korthikanti et al. 2022): all-gather before, reduce-scatter after.
    As many numbers as the one all-reduce; norms, dropout and what the backward keeps are a part in n on each rank."""
    gathered = ring_all_gather(parts)
    terms = [gelu(x @ up.T)[0] @ down.T for x, up, down in zip(gathered.values, *w)]
    scattered = ring_reduce_scatter(terms)
    return Counted(scattered.values, gathered.sent + scattered.sent)


# ---- pipeline --------------------------------------------------------------------------------------------------------


def one_forward_one_backward(stages: int, micro_batches: int) -> list[list[str]]:
    """What each stage does in order, "F3" or "B3" (Narayanan et al. 2021, "1F1B"): stage s runs stages - s forwards
    ahead, so it keeps the activations of that many micro-batches, not of all as GPipe."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage, micro_batches)
        order = [f"F{i}" for i in range(ahead)]
        for i in range(micro_batches):
            order.append(f"B{i}")
            if ahead + i < micro_batches:
                order.append(f"F{ahead + i}")
        orders.append(order)
    return orders


def pipeline_time(orders: Sequence[Sequence[str]], forward: float = 1.0, backward: float = 2.0) -> tuple[float, float]:
    """Time until all is done, and the share of it in which a stage waits ("bubble"). F_i waits for F_i of the stage
    before, B_i for B_i of the stage after. For equal stages the bubble is (stages - 1)/(micro_batches + stages - 1).

    Raises:
        ValueError: the orders wait for each other.
    """
    done: dict[tuple[int, str], float] = {}
    at, clock = [0] * len(orders), [0.0] * len(orders)
    while any(i < len(order) for i, order in zip(at, orders)):
        moved = False
        for stage, order in enumerate(orders):
            if at[stage] == len(order):
                continue
            task = order[at[stage]]
            before = stage - 1 if task[0] == "F" else stage + 1
            if 0 <= before < len(orders) and (before, task) not in done:
                continue
            start = max(clock[stage], done.get((before, task), 0.0))
            clock[stage] = done[stage, task] = start + (forward if task[0] == "F" else backward)
            at[stage], moved = at[stage] + 1, True
        if not moved:
            raise ValueError(f"a deadlock: {[order[i] for i, order in zip(at, orders) if i < len(order)]} wait")
    total, busy = max(clock), sum(forward if task[0] == "F" else backward for order in orders for task in order)
    return total, 1 - busy / (total * len(orders))
