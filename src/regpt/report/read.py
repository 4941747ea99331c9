"""A run folder as plain data: parse its files, keep the last row of every step, thin long series."""

import json
import tomllib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from regpt.errors import UserError

Row = dict[str, Any]
Column = list[float | None]

MAX_POINTS = 2000  # per series: more than a wide screen has pixels for
MAX_SAMPLE_STEPS = 100
TRAIN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gib")
SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "mfu")  # also the ones whose extremes survive thinning


@dataclass(frozen=True)
class Run:
    """What a run folder holds, steps ascending.

    Attributes:
        name: the folder's name.
        config: `config.toml`, empty when there is none.
        env: `env.json`, empty when there is none.
        train, val, evals, events: rows of `metrics.jsonl` by kind; one row a step (and task, metric or name).
        samples: rows of `samples.jsonl`; one row a step and prompt.
    """

    name: str
    config: Row
    env: Row
    train: list[Row]
    val: list[Row]
    evals: list[Row]
    events: list[Row]
    samples: list[Row]


def read_run(folder: Path) -> Run:
    """Everything the report needs from `folder`.

    Raises:
        UserError: no such folder, no metrics, no train row, or a file or line that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist; give the folder that regpt train --out made")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no metrics.jsonl, so it is not a run folder; give one that regpt train --out made"
        )
    rows = read_rows(path)
    train = of_kind(rows, "train")
    if not train:
        raise UserError(f"{path} has no row of kind 'train' yet; wait until the run has made a step")
    samples = folder / "samples.jsonl"
    return Run(
        name=folder.resolve().name,
        config=read_document(folder / "config.toml", tomllib.loads),
        env=read_document(folder / "env.json", json.loads),
        train=train,
        val=of_kind(rows, "val"),
        evals=of_kind(rows, "eval", "task", "metric"),
        events=of_kind(rows, "event", "name"),
        samples=latest(read_rows(samples) if samples.is_file() else [], "prompt"),
    )


def read_document(path: Path, loads: Callable[[str], Any]) -> Row:
    """The table in a TOML or JSON file; empty when the file is absent."""
    if not path.is_file():
        return {}
    try:
        document = loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # both parsers' errors and UnicodeDecodeError
        raise UserError(f"{path} cannot be read ({error}); restore it or move it away") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__} instead of an object; restore it or move it away")
    return document


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file. A torn last line, which a crash leaves behind, is dropped.

    Raises:
        UserError: any other line that is not an object with an integer `step`, by file and line.
    """
    lines = path.read_bytes().split(b"\n")  # not splitlines(): a text may hold other line separators
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # only the last line has no newline behind it
            raise UserError(
                f"{path} line {number} is not a JSON object with an integer 'step'; repair or delete that line"
            )
    return rows


def parse_row(line: bytes) -> Row | None:
    """One line as an object with an integer `step`, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None


def of_kind(rows: Iterable[Row], kind: str, *keys: str) -> list[Row]:
    """The last row of every step (and value of `keys`) among the rows of `kind`."""
    return latest([row for row in rows if row.get("kind") == kind], *keys)


def latest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Where a step occurs twice (after a resume) the last row counts; ascending by step."""
    last: dict[Hashable, Row] = {}
    for row in rows:
        last[(row["step"], *(str(row.get(key)) for key in keys))] = row
    return sorted(last.values(), key=lambda row: row["step"])


def number(value: Any) -> float | None:
    """`value` when it is a finite number; None for null, NaN, infinities and anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isfinite(value) else None


def column(rows: Iterable[Row], key: str) -> Column:
    return [number(row.get(key)) for row in rows]


def smooth(values: Sequence[float | None], span: int) -> Column:
    """Exponential moving average with weight 2 / (span + 1) for the newest value, None where `values` is.

    The span grows with the values seen, from 1 to at most `span`, an eighth of them in between: the steep start of a
    training curve is followed, not dragged behind.
    """
    smoothed: Column = []
    mean, seen = 0.0, 0
    for value in values:
        if value is not None:
            reach = min(span, 1 + seen / 8)
            mean += (value - mean) * 2 / (reach + 1)
            seen += 1
        smoothed.append(None if value is None else mean)
    return smoothed


def smoothing_span(rows: int) -> int:
    """Rows that the smoothed lines average over: a twenty-fifth of the run, between 2 and 200."""
    return min(200, max(2, rows // 25))


def thin(columns: Sequence[Sequence[float | None]], limit: int) -> list[int]:
    """At most `limit` row numbers, ascending, that keep the shape of every column.

    The first tenth of `limit` stays whole, for a logarithmic axis. What follows is cut into equal buckets; from each
    stay the rows at which a column has its minimum or maximum, so a single spike survives. The last row always stays.
    """
    n = len(columns[0])
    if n <= limit:
        return list(range(n))
    head = limit // 10
    buckets = max(1, (limit - head - 1) // (2 * len(columns)))
    edges = [head + (n - head) * i // buckets for i in range(buckets + 1)]
    kept = {*range(head), n - 1}
    for begin, end in pairwise(edges):
        for values in columns:
            there = [(value, i) for i in range(begin, end) if (value := values[i]) is not None]
            if there:
                kept |= {min(there)[1], max(there)[1]}
    return sorted(kept)


def training_seconds(train: Sequence[Row]) -> np.ndarray | None:
    """Time spent in training steps up to each row, (rows,); None when no row has `dt_ms`.

    Not the wall clock: pauses between a stop and a resume, evaluation and saving do not count.
    """
    dt_ms = column(train, "dt_ms")
    known = [value for value in dt_ms if value is not None]
    if not known:
        return None
    filled = np.array([np.median(known) if value is None else value for value in dt_ms])
    return (
        np.cumsum(filled * np.diff([0, *(row["step"] for row in train)])) / 1000
    )  # a row stands for the steps before it


def positions(train: Sequence[Row], steps: Sequence[int]) -> dict[str, Column]:
    """Where `steps` lie on each x axis that the rows allow: `step`, `tokens`, `seconds`; linear between rows."""
    known = np.array([0, *(row["step"] for row in train)], dtype=float)
    axes: dict[str, Column] = {"step": list(steps)}
    tokens = [value for value in column(train, "tokens") if value is not None]
    seconds = training_seconds(train)
    if len(tokens) == len(train):
        rising = np.maximum.accumulate(np.array([0, *tokens]))
        axes["tokens"] = [round(x) for x in np.interp(steps, known, rising)]
    if seconds is not None:
        axes["seconds"] = [short(x) for x in np.interp(steps, known, np.concatenate([[0], seconds]))]
    return axes


def build_table(run: Run, limit: int = MAX_POINTS) -> tuple[dict[str, Column], dict[str, Column]]:
    """The x axes and the columns of every chart, all of one length, on the union of the steps kept.

    Columns: those of `TRAIN_COLUMNS` that hold anything, `<name>_smooth`, `val_loss`, `eval:<task>/<metric>`.
    Smoothing happens before thinning, on every row.
    """
    columns = {key: column(run.train, key) for key in TRAIN_COLUMNS}
    span = smoothing_span(len(run.train))
    rows = thin([columns[key] for key in SMOOTHED], limit)
    columns |= {f"{key}_smooth": smooth(columns[key], span) for key in SMOOTHED}
    series = {key: {run.train[i]["step"]: values[i] for i in rows} for key, values in columns.items()}
    for key, measured in measurements(run).items():
        steps = list(measured)
        series[key] = {steps[i]: measured[steps[i]] for i in thin([list(measured.values())], limit // 2)}
    steps = sorted(set().union(*series.values()))
    table = {key: [short(values.get(step)) for step in steps] for key, values in series.items()}
    return positions(run.train, steps), {
        key: values for key, values in table.items() if any(x is not None for x in values)
    }


def measurements(run: Run) -> dict[str, dict[int, float | None]]:
    """Step → value of the validation loss and of every evaluation."""
    found: dict[str, dict[int, float | None]] = {"val_loss": {row["step"]: number(row.get("loss")) for row in run.val}}
    for row in run.evals:
        name = f"eval:{row.get('task')}/{row.get('metric')}"
        found.setdefault(name, {})[row["step"]] = number(row.get("value"))
    return found


def thin_samples(samples: Sequence[Row], limit: int = MAX_SAMPLE_STEPS) -> list[Row]:
    """The rows of at most `limit` steps, evenly spaced, the first and the last among them."""
    steps = sorted({row["step"] for row in samples})
    if len(steps) > limit:
        steps = [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]
    kept = set(steps)
    return [row for row in samples if row["step"] in kept]


def short(value: float | None) -> float | None:
    """Six significant digits: more than a chart can show, half the bytes."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
