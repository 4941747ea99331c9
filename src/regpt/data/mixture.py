"""Several data folders read as one, in fixed shares. Specified in docs/data-order.md."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from regpt.data.rows import Rows
from regpt.errors import UsageError

MAX_PERIOD = 1 << 16  # rows after which the pattern repeats: weights are exact when they fit, else rounded to this


class MixedRows:
    """Rows of `parts`, `counts[k]` of part k in every `sum(counts)` rows, evenly spread.

    Part k gives its own rows 0, 1, 2, … in order, so what is read of one folder depends on nothing in the others.
    """

    def __init__(self, parts: Sequence[Rows], counts: Sequence[int]) -> None:
        self.parts, self.counts = list(parts), list(counts)
        self.seq_len = parts[0].seq_len
        self.source = "the mixture of " + ", ".join(part.source for part in parts)
        self.epoch_tokens = sum(part.epoch_tokens for part in parts)
        self.period = sum(counts)
        self.turns = spread(counts)  # (period,)
        is_turn = np.arange(len(counts))[:, None] == self.turns  # (parts, period)
        self.turns_before = np.cumsum(np.pad(is_turn, ((0, 0), (1, 0))), axis=1)  # (parts, period + 1)

    def part_row(self, part: int, row: int) -> int:
        """How many of rows [0, row) are of `part`: the number of its first row from `row` on."""
        periods, rest = divmod(row, self.period)
        return int(periods * self.turns_before[part, -1] + self.turns_before[part, rest])

    def read(self, first: int, count: int) -> np.ndarray:
        turns = self.turns[np.arange(first, first + count) % self.period]  # (count,)
        read = {}
        for k in np.unique(turns).tolist():
            begin, end = self.part_row(k, first), self.part_row(k, first + count)
            read[k] = self.parts[k].read(begin, end - begin)
        rows = np.empty((count, self.seq_len + 1), next(iter(read.values())).dtype)
        for k, part in read.items():
            rows[turns == k] = part
        return rows

    def epoch_rows(self, limit: int) -> int:
        return min(limit, sum(part.epoch_rows(limit) for part in self.parts))

    def epochs(self, row: int) -> list[float]:
        return [times for k, part in enumerate(self.parts) for times in part.epochs(self.part_row(k, row))]

    def cut(self, count: int, seq_len: int) -> "tuple[MixedRows, MixedRows]":
        """The pattern of turns begins anew with the rows of another length."""
        parts = [part.cut(self.part_row(k, count), seq_len) for k, part in enumerate(self.parts)]
        ended, following = zip(*parts)
        return MixedRows(ended, self.counts), MixedRows(following, self.counts)

    def rows_within(self, part_rows: Sequence[int]) -> int:
        """The most rows that take no more than `part_rows[k]` of each part."""
        low, high = 0, sum(part_rows)
        while low < high:  # part_row grows with the row
            middle = (low + high + 1) // 2
            if all(self.part_row(k, middle) <= limit for k, limit in enumerate(part_rows)):
                low = middle
            else:
                high = middle - 1
        return low


def spread(counts: Sequence[int]) -> np.ndarray:
    """(P,) uint16, P = sum(counts): whose turn each of P rows is, such that after any n rows (repeated for ever) part k
    has had more than n·counts[k]/P - 1 and fewer than n·counts[k]/P + 1 of them.

    Turn j of part k may be given to the rows from ⌊j·P/c⌋ to ⌈(j + 1)·P/c⌉ - 1; each row is given to the waiting turn
    whose last row is the earliest, the lower k of equals. One always finds its row: Baruah, Cohen, Plaxton & Varvel
    1996, "Proportionate progress"; Tijdeman 1980, "The chairman assignment problem".
    """
    period = sum(counts)
    turns = np.empty(period, dtype=np.uint16)
    given = [0] * len(counts)
    for row in range(period):
        waiting = [
            (-(-(given[k] + 1) * period // c), k) for k, c in enumerate(counts) if given[k] * period < (row + 1) * c
        ]
        turns[row] = turn = min(waiting)[1]
        given[turn] += 1
    return turns


def whole_shares(weights: Mapping[str, float]) -> list[int]:
    """Rows of each folder in a period: the weights as written in decimals, divided by their greatest common divisor.

    Where that makes a period longer than `MAX_PERIOD`, each share is rounded to a whole number of `MAX_PERIOD`ths.

    Raises:
        UsageError: a weight too small next to the others.
    """
    exact = [Fraction(str(weight)) for weight in weights.values()]
    total = sum(exact)
    period = math.lcm(*((share / total).denominator for share in exact))
    if period <= MAX_PERIOD:
        return [int(share / total * period) for share in exact]
    counts = [round(share / total * MAX_PERIOD) for share in exact]
    for path, count in zip(weights, counts):
        if not count:
            raise UsageError(
                f"data.mixture gives {path!r} the weight {weights[path]}, less than 1/{MAX_PERIOD} of all; "
                "give it more, or leave it out"
            )
    return counts
