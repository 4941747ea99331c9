"""A run folder as plain data: parse its files, follow the run's timeline, keep the last row of every step."""

import json
import tomllib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.files import is_file, is_folder, resolved
from regpt.report.timeline import Row, current, current_samples, steps_back


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


def read_run(folder: Path) -> Run:
    """Everything the report needs from `folder`.

    Raises:
        UserError: no such folder, no metrics, no train row, or a file or line that cannot be read.
    """
    if not is_folder(folder):
        raise UserError(f"run folder {str(folder)!r} does not exist; give the folder that regpt train --out made")
    path = folder / "metrics.jsonl"
    if not is_file(path):
        raise UserError(
            f"{str(folder)!r} has no metrics.jsonl, so it is not a run folder; give one that regpt train --out made"
        )
    written = read_rows(path)
    back = steps_back(written)
    rows = current(written, back)
    train = of_kind(rows, "train")
    if not train:
        raise UserError(f"{path} has no row of kind 'train' yet; wait until the run has made a step")
    samples = folder / "samples.jsonl"
    last_step = max(row["step"] for row in rows if row.get("kind") != "event")
    return Run(
        name=resolved(folder).name,
        config=read_document(folder / "config.toml", tomllib.loads),
        env=read_document(folder / "env.json", json.loads),
        train=train,
        val=of_kind([row for row in rows if "source" not in row], "val"),
        val_sources=of_kind([row for row in rows if "source" in row], "val", "source"),
        evals=of_kind(rows, "eval", "task", "metric"),
        updates=of_kind(rows, "updates"),
        events=of_kind(rows, "event", "name"),
        samples=latest(current_samples(read_rows(samples) if is_file(samples) else [], back, last_step), "prompt"),
        folder=folder,
    )


def read_document(path: Path, loads: Callable[[str], Any]) -> Row:
    """The table in a TOML or JSON file; empty when the file is absent."""
    if not is_file(path):
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


def section(document: Row, name: str) -> Row:
    """A table of `config.toml` or `env.json`; empty when it is absent or something else."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}
