"""A run folder as plain data: its files parsed, its timeline followed, the last row of every step kept.

After a step back (a resume from an older checkpoint, a rewind) earlier rows of later steps do not count.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from regpt.checkpoint.best import STEPS_BACK
from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.files import is_file, is_folder, resolved
from regpt.structured import json_lines, parse_json, parse_toml, read_object, read_small

Row = dict[str, Any]
Items = dict[Hashable, Row]
LARGEST = 1e100  # float32 ends at 3.4e38
MOST_STEPS = 10**12  # of a millisecond each: thirty years
Differences = list[tuple[str, list[Any]]]  # keys, joined with dots, and each run's value, None where it has none
DATA = ("manifest_sha256", "tokenizer", "tokenizer_sha256", "train_tokens", "val_tokens")
# Follow from other keys, differ between any two runs, or are shown elsewhere.
INCIDENTAL = ("argv", "started", "host", "data", "unigram_loss", "parameters", "peak")
HISTORY = ("epochs", "checkpoint")  # events of one timeline; all others stay after a step back


@dataclass(frozen=True)
class RunData:
    """Contents of a run folder, steps ascending.

    Attributes:
        name: the folder's name.
        config: `config.toml`, empty when there is none.
        env: `env.json`, empty when there is none.
        train, val, evals, updates, events: rows of `metrics.jsonl` by kind; one row a step (and task, metric or name).
        val_sources: validation rows of one source of the data each; one row a step and source.
        samples: rows of `samples.jsonl`; one row a step and prompt.
        folder: where it was read from.
        left_out: a sentence for each file with invalid lines.
    """

    name: str
    config: Row
    env: Row
    train: list[Row]
    val: list[Row]
    val_sources: list[Row]
    evals: list[Row]
    updates: list[Row]
    events: list[Row]
    samples: list[Row]
    folder: Path
    left_out: tuple[str, ...] = ()


def read_run(folder: Path) -> RunData:
    """Read everything that reports and comparisons need from `folder`.

    Raises:
        UserError: no such folder, no metrics, no train row, or a file that cannot be read.
    """
    if not is_folder(folder):
        raise UserError(f"run folder {str(folder)!r} does not exist; give the folder that regpt train --out made")
    path = folder / "metrics.jsonl"
    if not is_file(path):
        raise UserError(
            f"{str(folder)!r} has no metrics.jsonl, so it is not a run folder; give one that regpt train --out made"
        )
    written, left_out = read_rows(path)
    rows = current(written)
    train = of_kind(rows, "train")
    if not train:
        raise UserError(f"{path} has no row of kind 'train' yet; wait until the run has made a step")
    samples, odd_samples = read_rows(folder / "samples.jsonl")
    return RunData(
        name=resolved(folder).name,
        config=read_document(folder / "config.toml", parse_toml),
        env=read_document(folder / "env.json", parse_json),
        train=train,
        val=of_kind([row for row in rows if "source" not in row], "val"),
        val_sources=of_kind([row for row in rows if "source" in row], "val", "source"),
        evals=of_kind([*rows, *later_evaluations(folder)], "eval", "task", "metric"),
        updates=of_kind(rows, "updates"),
        events=of_kind(rows, "event", "name"),
        samples=latest(current_samples(samples, written), "prompt"),
        folder=folder,
        left_out=(*left_out, *odd_samples),
    )


def later_evaluations(folder: Path) -> list[Row]:
    """Rows of what `regpt eval RUN --json RUN/evals/FILE.json` wrote; none of a damaged file."""
    found: list[Row] = []
    for path in sorted((folder / "evals").glob("*.json")):
        try:
            report = read_object(path, "write it again with regpt eval")
        except UserError:
            continue
        step = report.get("step")
        for name, task in section(report, "tasks").items() if isinstance(step, int) else ():
            metrics = section(task, "metrics") if isinstance(task, dict) else {}
            rows = {metric: section(metrics, metric) for metric in metrics}
            found += [{"kind": "eval", "step": step, "task": name, "metric": metric, **rows[metric]} for metric in rows]
    return found


def rows_by_step(run: Path, kind: str) -> dict[int, Row]:
    """Step → row of `kind` in RUN/metrics.jsonl, also while it is written; where a step occurs twice the last row."""
    rows, _ = read_rows(run / "metrics.jsonl")
    return {row["step"]: row for row in of_kind(rows, kind) if "source" not in row}


def with_own_names(runs: Sequence[RunData]) -> list[RunData]:
    """The runs; those of one name get the folder above in front of it, or a number after it."""
    named: list[RunData] = []
    for i, run in enumerate(runs):
        clash = [other.name for other in runs].count(run.name) > 1
        name = f"{run.folder.resolve().parent.name}/{run.name}" if clash else run.name
        if any(name == other.name for other in named):
            name = f"{name} ({i + 1})"
        named.append(replace(run, name=name))
    return named


def read_document(path: Path, loads: Callable[[bytes], Any]) -> Row:
    """The table in a TOML or JSON file; empty when the file is absent."""
    if not is_file(path):
        return {}
    data = read_small(path, "restore it or move it away")
    try:
        document = loads(data)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or move it away") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__} instead of an object; restore it or move it away")
    return document


def section(document: Row, name: str) -> Row:
    """A table of `config.toml` or `env.json`; empty when it is absent or something else."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def flatten(document: Row, prefix: str = "") -> list[tuple[str, Any]]:
    """Keys and values of a nested table, keys joined with dots."""
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        found += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def number(value: Any) -> float | None:
    """`value` when it is a number whose sums and squares are finite; None for null, NaN and anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isfinite(value) and abs(value) < LARGEST else None


def differing(documents: Sequence[Row]) -> Differences:
    """Keys whose values are not the same in all `documents`."""
    flat = [dict(flatten(document)) for document in documents]
    rows = [(key, [one.get(key) for one in flat]) for key in dict.fromkeys(key for one in flat for key in one)]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def differences(runs: Sequence[RunData]) -> dict[str, Differences]:
    """Differing keys: `config`; `code`, versions, commit and machine; `data`, its hashes and counts, not its path."""
    code = [{key: value for key, value in run.env.items() if key not in INCIDENTAL} for run in runs]
    data = [{key: value for key, value in section(run.env, "data").items() if key in DATA} for run in runs]
    return {"config": differing([run.config for run in runs]), "code": differing(code), "data": differing(data)}


# ---- rows


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The valid rows of a JSON Lines file, and a sentence about the other lines; both empty where there is no file.

    A last line that a crash or a copy has torn is dropped silently.
    """
    rows, odd = [], []
    for line, row, ended in json_lines(path) if is_file(path) else ():
        if row is not None and is_row(row):
            rows.append(row)
        elif ended:
            odd.append(line)
    return rows, report_left_out(path, odd)


def report_left_out(path: Path, lines: Sequence[int]) -> list[str]:
    """One sentence about the invalid lines with these numbers, also printed as a warning; empty without any."""
    if not lines:
        return []
    count = f"{len(lines):,} lines of {path} are no rows and were left out, the first is line {lines[0]:,}"
    sentence = count if len(lines) > 1 else f"line {lines[0]:,} of {path} is no row and was left out"
    print_note(f"warning: {sentence}")
    return [sentence]


def is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


NOT_FINITE = ("nan", "inf", "-inf")
REQUIRED = {
    "train": ("loss",),
    "val": ("loss",),
    "eval": ("task", "metric", "value"),
    "updates": ("ratio",),
    "event": ("name",),
    "samples": ("texts",),
}
# Keys of metrics.jsonl and samples.jsonl that are read, and the type of their values; null is always allowed.
NUMBERS = (
    *("tokens", "loss", "lr", "grad_norm", "dt_ms", "tokens_per_s", "mfu", "flops", "peak_memory_gib", "time", "bpb"),
    *("loss_ema", "bpb_ema", "value", "stderr", "n", "left_out", "ratio"),
)
TYPES: dict[str, type] = {
    **dict.fromkeys(("kind", "name", "task", "metric", "source", "prompt", "policy"), str),
    **dict.fromkeys(("missing", "texts"), list),
    **dict.fromkeys(("ratios", "epochs"), dict),
}


def is_row(row: Row) -> bool:
    """Whether `row` is a valid row: a step, the keys that its kind requires, and values of the right types. A row of
    samples has no kind."""
    step, kind = row.get("step"), row.get("kind", "samples")
    if not is_number(step) or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
        return False
    if not isinstance(kind, str) or not all(key in row for key in REQUIRED.get(kind, ())):
        return False
    refused = NOT_FINITE if kind == "event" else ()  # how an event writes the numbers of a refused update
    numbers = (row[key] for key in NUMBERS if key in row)
    return all(value is None or isinstance(value, TYPES.get(key, object)) for key, value in row.items()) and all(
        value is None or is_number(value) or value in refused for value in numbers
    )


def of_kind(rows: Iterable[Row], kind: str, *keys: str) -> list[Row]:
    """The last row of every step (and value of `keys`) among the rows of `kind`."""
    return latest([row for row in rows if row.get("kind") == kind], *keys)


def latest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of every step (and value of `keys`), as after a resume; ascending by step."""
    last: dict[Hashable, Row] = {}
    for row in rows:
        last[(row["step"], *(str(row.get(key)) for key in keys))] = row
    return sorted(last.values(), key=lambda row: row["step"])


# ---- the timeline


def current(rows: Sequence[Row]) -> list[Row]:
    """The rows of `metrics.jsonl` that count: those of later steps before a step back do not, most events do."""
    kept, limit = [], inf  # the lowest step that the run goes back to after a row
    for row in reversed(rows):
        name = row.get("name") if row.get("kind") == "event" else None
        if row["step"] <= limit or (name is not None and name not in HISTORY):
            kept.append(row)
        if name in STEPS_BACK:
            limit = min(limit, row["step"])
    return kept[::-1]


def current_samples(samples: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows of `samples.jsonl` that count, of a run with the metrics `rows`. A run that never went back may have
    sampled beyond its last row: it may log only some updates (`log.every_steps`)."""
    back = [row for row in rows if row.get("kind") == "event" and row.get("name") in STEPS_BACK]
    last = max(row["step"] for row in current(rows) if row.get("kind") != "event") if back else inf
    return [
        row
        for row in samples
        if row["step"] <= last
        and not any(row["step"] > one["step"] and time_of(row) < time_of(one) < inf for one in back)
    ]


def time_of(row: Row) -> float:
    """Unix seconds, infinite where unknown."""
    time = number(row.get("time"))
    return inf if time is None else time


# ---- scores of single items, kept for paired tests


def item_file(folder: Path, task: str, step: int) -> Path:
    """File of the items of `task` after `step` updates, `core-piqa-step-00000250.jsonl` for `core/piqa`."""
    name = re.sub(r"[/:\\]", "-", task)
    return folder / f"{name}-step-{step:08d}.jsonl"


def kept_items(run: RunData, task: str, step: int) -> Items | None:
    """Item → its row of `task` after `step` updates, under RUN/evals; None where the run has not kept them, or has just
    replaced them by those of a later step. A warning counts lines without an `item`, or with one that occurred."""
    path = item_file(run.folder / "evals", task, step)
    items: Items = {}
    odd = []
    try:
        for line, row, _ in json_lines(path):
            item = row.get("item") if row else None
            if row is None or not isinstance(item, (str, int)) or item in items:
                odd.append(line)
            else:
                items[item] = row
    except FileNotFoundError:
        return None
    report_left_out(path, odd)
    return items
