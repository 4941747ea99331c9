"""A run folder as plain data: parse its files, follow the run's timeline, keep the last row of every step."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.files import is_file, is_folder, resolved
from regpt.report.timeline import Row, current, current_samples, steps_back
from regpt.structured import json_lines, parse_json, parse_toml, read_small

LARGEST = 1e100  # float32 ends at 3.4e38
MOST_STEPS = 10**12  # of a millisecond each: thirty years


@dataclass(frozen=True)
class Run:
    """What a run folder holds, steps ascending.

    Attributes:
        name: the folder's name.
        config: `config.toml`, empty when there is none.
        env: `env.json`, empty when there is none.
        train, val, evals, updates, events: rows of `metrics.jsonl` by kind; one row a step (and task, metric or name).
        val_sources: validation rows of one source of the data each; one row a step and source.
        samples: rows of `samples.jsonl`; one row a step and prompt.
        folder: where it was read from.
        left_out: a sentence for each file with lines that are no rows.
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


def read_run(folder: Path) -> Run:
    """Everything the report needs from `folder`.

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
    back = steps_back(written)
    rows = current(written, back)
    train = of_kind(rows, "train")
    if not train:
        raise UserError(f"{path} has no row of kind 'train' yet; wait until the run has made a step")
    samples, odd_samples = read_rows(folder / "samples.jsonl")
    last_step = max(row["step"] for row in rows if row.get("kind") != "event")
    return Run(
        name=resolved(folder).name,
        config=read_document(folder / "config.toml", parse_toml),
        env=read_document(folder / "env.json", parse_json),
        train=train,
        val=of_kind([row for row in rows if "source" not in row], "val"),
        val_sources=of_kind([row for row in rows if "source" in row], "val", "source"),
        evals=of_kind(rows, "eval", "task", "metric"),
        updates=of_kind(rows, "updates"),
        events=of_kind(rows, "event", "name"),
        samples=latest(current_samples(samples, back, last_step), "prompt"),
        folder=folder,
        left_out=(*left_out, *odd_samples),
    )


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


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a JSON Lines file, and a sentence about lines that are none; nothing where there is no file.

    A row has a `step`, and under every key of `KINDS` a value of its kind. A last line that a crash or a copy has torn
    is left out without a word.
    """
    rows, odd = [], []
    for number, row, ended in json_lines(path) if is_file(path) else ():
        if row is not None and is_row(row):
            rows.append(row)
        elif ended:
            odd.append(number)
    return rows, say_left_out(path, odd)


def say_left_out(path: Path, lines: Sequence[int]) -> list[str]:
    """One sentence, which is also printed as a warning, about the lines with these numbers; none without any."""
    if not lines:
        return []
    count = f"{len(lines):,} lines of {path} are no rows and were left out, the first is line {lines[0]:,}"
    said = count if len(lines) > 1 else f"line {lines[0]:,} of {path} is no row and was left out"
    print_note(f"warning: {said}")
    return [said]


def is_row(row: Row) -> bool:
    """Whether `row` can be one of a run: a step from 0 on, what its kind must have (`REQUIRED`; a row of samples has
    no kind), and nothing of another kind than `KINDS` has it."""
    step, kind = row.get("step"), row.get("kind", "samples")
    if not is_number(step) or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
        return False
    if not is_text(kind) or not all(key in row for key in REQUIRED.get(kind, ())):
        return False
    written = NOT_FINITE if kind == "event" else ()  # what an event says of a refused update
    return all(
        row[key] is None or is_kind(row[key]) or (is_text(row[key]) and row[key] in written)
        for key, is_kind in KINDS.items()
        if key in row
    )


def is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


NUMBERS = (
    *("tokens", "loss", "lr", "grad_norm", "dt_ms", "tokens_per_s", "mfu", "flops", "peak_memory_gib", "time", "bpb"),
    *("loss_ema", "bpb_ema", "value", "stderr", "n", "left_out", "ratio"),
)
NOT_FINITE = ("nan", "inf", "-inf")
REQUIRED = {
    "train": ("loss",),
    "val": ("loss",),
    "eval": ("task", "metric", "value"),
    "updates": ("ratio",),
    "event": ("name",),
    "samples": ("texts",),
}
# Keys of metrics.jsonl and samples.jsonl that are looked at, and what may be there, next to null.
KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(NUMBERS, is_number),
    **dict.fromkeys(("kind", "name", "task", "metric", "source", "prompt", "policy"), is_text),
    **dict.fromkeys(("missing", "texts"), lambda value: isinstance(value, list)),
    **dict.fromkeys(("ratios", "epochs"), lambda value: isinstance(value, dict)),
}


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
    """`value` when it is a number whose sums and squares are finite; None for null, NaN and anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isfinite(value) and abs(value) < LARGEST else None


def section(document: Row, name: str) -> Row:
    """A table of `config.toml` or `env.json`; empty when it is absent or something else."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}
