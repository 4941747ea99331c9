"""A task: prompts and the judgement of their scores; evaluated whole or on a fixed part, with standard errors."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, Protocol

import numpy as np

from regpt.data.order import permutation
from regpt.errors import UsageError, UserError
from regpt.evals.packing import Prompt, is_cut
from regpt.evals.score import Progress, Scorer, Scores

SUBSET_SEED = 0  # of the order in which items are taken when not all of them are: the same for every run
Tolerate = Callable[[str, UserError], None]  # receives a task's name and why it cannot be evaluated; its neighbours are


def refuse(task: str, error: UserError) -> NoReturn:
    """A `Tolerate` that tolerates nothing."""
    raise error


class Task(Protocol):
    """Items with one prompt each.

    Attributes:
        name: as in results, such as `hellaswag` or `core/arc_easy`.
        n_items: how many there are.
        items_sha256: hash of the items.
        baseline: expected accuracy of a guess, None where it is unknown.
        lengths: (n_items,) most scored tokens of an ending of each item; a model that scores it has as many positions.
    """

    name: str
    n_items: int
    items_sha256: str
    baseline: float | None
    lengths: np.ndarray

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        """The prompts of the items numbered `chosen`."""
        ...

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """Metric → (chosen,) float64, the contribution of each item: 1 for right, 0 for wrong."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` items and its standard error, the sample's standard deviation / √n, which one item does not have;
    neither has a value without items. Of replies that are generated also a 95 % interval."""

    value: float | None
    stderr: float | None
    n: int
    interval: tuple[float, float] | None = None

    def report(self) -> dict[str, Any]:
        """As JSON, without an interval that is not there."""
        return {name: value for name, value in asdict(self).items() if name != "interval" or value is not None}

    def text(self) -> str:
        """`0.2955 (0.2870 to 0.3042)`, or `0.2955 ± 0.0046`."""
        if self.interval is None or self.value is None:
            return with_error(self.value, self.stderr)
        return f"{self.value:.4f} ({self.interval[0]:.4f} to {self.interval[1]:.4f})"


@dataclass(frozen=True)
class Result:
    """Outcome of a task, ours or lm-eval's.

    Attributes:
        task: its name.
        outcomes: metric → (items,) contribution of each evaluated item.
        chosen: (items,) the numbers of these items, ascending.
        n_items: how many the task has.
        items_sha256, baseline: the task's, where it has them.
        seconds: tokenization, computation and everything else but compilation.
        cut: evaluated items that are longer than the model, and were truncated.
        left_out: items passed over, as one of their endings has more tokens than the model has positions.
        metrics: their estimates, where these are not the means of `outcomes`.
    """

    task: str
    outcomes: dict[str, np.ndarray]
    chosen: np.ndarray
    n_items: int
    items_sha256: str = ""
    baseline: float | None = None
    seconds: float = 0.0
    cut: int = 0
    left_out: int = 0
    metrics: dict[str, Estimate] | None = None

    def estimates(self) -> dict[str, Estimate]:
        return self.metrics or {metric: estimate(values) for metric, values in self.outcomes.items()}

    def item_lines(self) -> str:
        """One JSON object a line for each evaluated item, so that two models can be compared item by item: `item` names
        it across files of the same items, and a number for each metric."""
        items = self.items_sha256[:8]
        names = [f"{items}:{i}" if items else i for i in self.chosen.tolist()]
        columns = {metric: values.tolist() for metric, values in self.outcomes.items()}
        rows = [{"item": name} | {key: column[k] for key, column in columns.items()} for k, name in enumerate(names)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def report(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "metrics": {name: found.report() for name, found in self.estimates().items()},
            "n": len(self.chosen),
            "n_items": self.n_items,
            "baseline": self.baseline,
            "seconds": self.seconds,
            "cut": self.cut,
            "left_out": self.left_out,
            "items_sha256": self.items_sha256,
        }


def refuse_if_nothing_fits(tasks: Sequence[Task], max_seq_len: int) -> None:
    """Raise a UserError, before anything is computed, where a model of `max_seq_len` can score no item of any task."""
    if tasks and not any(fitting(task, max_seq_len).any() for task in tasks):
        names = ", ".join(task.name for task in tasks[:5]) + (", …" if len(tasks) > 5 else "")
        raise UserError(
            f"every item of {names} has an ending longer than the {max_seq_len:,} tokens that the model reads; choose "
            "other tasks, or use a model with longer sequences"
        )


def fitting(task: Task, max_seq_len: int) -> np.ndarray:
    """(n_items,) bool, whether a model of `max_seq_len` can score all endings of an item."""
    return np.asarray(task.lengths) <= max_seq_len


def truncation_notice(results: Iterable[Result], max_seq_len: int) -> list[str]:
    """Sentences about the items that a model of `max_seq_len` did not see whole, or not at all."""
    results, longer = list(results), f"longer than the model's {max_seq_len:,} tokens"
    cut = [f"{one.cut:,} of {len(one.chosen):,} items of {one.task}" for one in results if one.cut]
    out = [
        f"{one.left_out:,} of {len(one.chosen) + one.left_out:,} items of {one.task}" for one in results if one.left_out
    ]
    return [
        f"{', '.join(which)} {what}"
        for which, what in (
            (cut, f"are {longer}: truncated"),
            (out, f"have an ending {longer}: left out"),
        )
        if which
    ]


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error of `values` (items,). For 0 and 1 the latter is √(p(1-p)/(n-1)), as lm-eval's."""
    n = len(values)
    if not n:
        return Estimate(None, None, 0)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None, n)


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Of a share of `n` (Wilson 1927); of shares of each item, `right` their sum, it is at least as wide as it must be:
    0 or 1 vary most."""
    share, by = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / by
    half = z / by * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(values: np.ndarray) -> Estimate:
    """The estimate of shares with its interval; of other numbers without."""
    found = estimate(values)
    if not found.n or values.min() < 0 or values.max() > 1:
        return found
    return replace(found, interval=wilson_interval(float(values.sum()), found.n))


def with_error(value: float | None, stderr: float | None, absent: str = "-") -> str:
    """`0.2955 ± 0.0046`; `absent` without a value."""
    if value is None:
        return absent
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def evaluate_task(task: Task, scorer: Scorer, *, max_items: int = 0, progress: Progress | None = None) -> Result:
    """Evaluate `task` on all items, or on the first `max_items` of one fixed order: larger parts contain smaller ones.

    Items with an ending longer than the model are passed over, and counted.
    """
    if max_items < 0:
        raise UsageError("a limit of items is below 0; 0 sets no limit")
    before, started = scorer.cost.compile_seconds, time.perf_counter()
    order = permutation(SUBSET_SEED, 0, task.n_items).astype(np.int64)
    fits = fitting(task, scorer.max_seq_len)[order]
    passed, order = np.flatnonzero(~fits), order[fits]  # places of the items passed over; items that are left
    n = min(max_items or len(order), len(order))
    chosen = np.sort(order[:n])
    end = len(fits) if n == len(order) else np.flatnonzero(fits)[n - 1] + 1  # of the places asked for
    prompts = task.prompts(chosen.tolist())
    cut = sum(is_cut(prompt, scorer.max_seq_len) for prompt in prompts)
    scores = scorer(prompts, progress)
    outcomes = task.judge(scores, chosen.tolist())
    spent = time.perf_counter() - started - (scorer.cost.compile_seconds - before)
    facts = (task.n_items, task.items_sha256, task.baseline, spent, cut, int((passed < end).sum()))
    return Result(task.name, outcomes, chosen, *facts)
