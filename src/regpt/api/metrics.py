"""A run as data: its settings, its metrics as NumPy arrays, its samples."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from regpt.api.arguments import checked
from regpt.config import RunConfig
from regpt.errors import UsageError, nearest
from regpt.report.read import Row
from regpt.report.read import read_run as read_rows
from regpt.runs.folder import read_run_config

Value = TypeVar("Value")


class Named(dict[str, Value], Generic[Value]):
    """A dict that names the nearest key when one is missing (a `UsageError`)."""

    def __missing__(self, name: str) -> Value:
        raise UsageError(f"there is no {name!r} here{nearest(name, self)}; there is: {', '.join(self) or 'nothing'}")


class Table(Named[np.ndarray]):
    """Column → array (rows,), steps ascending: int64 where all values are integers, float64 with NaN where one is
    missing, bool, otherwise object."""

    @property
    def rows(self) -> int:
        return next((len(values) for values in self.values()), 0)


@dataclass(frozen=True, repr=False)
class TrainingRun:
    """A run folder, as it was when it was read. Wherever a path is expected, it is the run's.

    Attributes:
        folder: the run.
        config: its settings.
        env: versions, device, data: its env.json.
        metrics: kind of row → table. `train` (a row an update: loss, lr, grad_norm, tokens, dt_ms, tokens_per_s, …),
            `val` (loss, bpb), `val_sources`, `eval` (task, metric, value, n), `updates`, `event` (docs/formats.md).
        samples: texts written on the way; each has `step`, `prompt`, `texts`.
    """

    folder: Path
    config: RunConfig
    env: dict[str, Any]
    metrics: Named[Table]
    samples: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.metrics["train"]["step"][-1])

    @property
    def finished(self) -> bool:
        """Whether all updates are made."""
        return self.step >= self.config.train.steps

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        val = self.metrics["val"].get("loss")
        loss = "" if val is None else f", validation loss {val[-1]:.4f}"
        return f"<TrainingRun {str(self.folder)!r}: step {self.step:,} of {self.config.train.steps:,}{loss}>"


@checked
def read_run(run: str | os.PathLike[str]) -> TrainingRun:
    """The run in the folder `run`, also while it is written. Where a step occurs twice, the last row counts.

    Raises:
        UserError: no such folder, no run, no step made yet, or a file that cannot be read.
    """
    folder = Path(run)
    read = read_rows(folder)
    kinds = {
        "train": read.train,
        "val": read.val,
        "val_sources": read.val_sources,
        "eval": read.evals,
        "updates": read.updates,
        "event": read.events,
    }
    metrics = Named({kind: table(rows) for kind, rows in kinds.items()})
    return TrainingRun(folder, read_run_config(folder), read.env, metrics, read.samples)


def table(rows: Iterable[Row]) -> Table:
    """Columns of `rows`, in the order in which they first occur; the kind, the same in all, is left out."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row if name != "kind")
    return Table({name: column([row.get(name) for row in rows]) for name in names})


def column(values: list[Any]) -> np.ndarray:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {int, float}:
        if kinds == {int} and None not in values:
            return np.array(values, np.int64)
        return np.array(values, np.float64)  # None becomes NaN
    if kinds == {bool} and None not in values:
        return np.array(values, bool)
    found = np.empty(len(values), object)
    found[:] = values
    return found
