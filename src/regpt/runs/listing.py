"""`regpt runs`: the state of every run below a folder, from its lock, its last rows and its checkpoints."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regpt.checkpoint.load import CHECKPOINTS, checkpoints, step_of
from regpt.console.text import counted
from regpt.errors import UserError
from regpt.files import exists, is_file, is_folder, is_locked, stat_or_none
from regpt.parallel.mesh import HANG_SECONDS
from regpt.report.read import is_row, number, read_document, section
from regpt.runs.folder import CONFIG, LOCK
from regpt.structured import parse_row, parse_toml

METRICS = "metrics.jsonl"
TAIL_BYTES = 1 << 20  # of metrics.jsonl that are read: thousands of rows
DEPTH = 3  # of folders below the one that is given

State = Literal["running", "finished", "stopped", "failed", "stalled", "damaged"]


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Attributes:
        run: its path.
        state: running; finished: all updates are made; stopped: before that, and saved; failed: before that, without
            saving its last step; stalled: its process writes nothing for longer than `train.hang_seconds`; damaged.
        step: updates made.
        steps: updates planned.
        loss: the last validation loss, or the last training loss before the first validation.
        tokens_per_s: of the last update.
        age_s: seconds since its last row.
        note: reason, of a run that failed, stalls or is damaged.
    """

    run: str
    state: State
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    age_s: float | None = None
    note: str = ""


def list_runs(folder: Path, depth: int = DEPTH) -> Iterator[ListedRun]:
    """The runs in and below `folder`, by name; a folder that cannot be looked into is one that is damaged."""
    try:
        if any(exists(folder / name) for name in (CONFIG, METRICS, CHECKPOINTS)):
            yield describe(folder)
            return
        inner = sorted(path for path in folder.iterdir() if is_folder(path) and not path.name.startswith("."))
    except (OSError, UserError) as error:
        yield ListedRun(str(folder), "damaged", note=str(getattr(error, "strerror", None) or error))
        return
    for path in inner if depth else ():
        yield from list_runs(path, 0 if path.is_symlink() else depth - 1)  # a link may lead back here


def describe(run: Path) -> ListedRun:
    """The state of `run`; whatever is wrong with its files becomes a note."""
    try:
        train = section(read_document(run / CONFIG, parse_toml), "train")
        rows = last_rows(run / METRICS)
        saved = [step_of(path) for path in checkpoints(run)]
    except (OSError, UserError) as error:
        return ListedRun(str(run), "damaged", note=str(getattr(error, "strerror", None) or error))
    if not is_file(run / CONFIG):
        return ListedRun(str(run), "damaged", note=f"{CONFIG} is missing")
    updates = [row for row in rows if row.get("kind") == "train"]
    step = updates[-1]["step"] if updates else max(saved, default=0)
    validated = [row for row in rows if row.get("kind") == "val" and "source" not in row]
    planned = number(train.get("steps"))
    steps = None if planned is None else int(planned)
    written = stat_or_none(run / METRICS) or stat_or_none(run / CONFIG)
    age = max(0.0, time.time() - written.st_mtime) if written else 0.0
    state, note = state_of(run, rows, step, steps, max(saved, default=0), age, number(train.get("hang_seconds")))
    loss = number(validated[-1]["loss"]) if validated else number(updates[-1]["loss"]) if updates else None
    speed = number(updates[-1].get("tokens_per_s")) if updates else None
    return ListedRun(str(run), state, step, steps, loss, speed, age, note)


def state_of(
    run: Path, rows: list[dict[str, Any]], step: int, steps: int | None, saved: int, age: float, hang: float | None
) -> tuple[State, str]:
    if is_locked(run / LOCK):
        if age > (hang or HANG_SECONDS):
            return "stalled", f"no row for {age:,.0f} seconds"
        return "running", ""
    if steps is not None and step >= steps:
        return "finished", ""
    refused = [row for row in rows if row.get("name") == "non_finite" and row["step"] >= step]
    if refused and refused[-1].get("policy") == "stop":
        return "failed", "a loss or gradient that is not finite"
    if exists(run / LOCK):
        return "failed", "its process was killed"
    if step > saved:
        return "failed", f"{counted(step - saved, 'step')} after its last checkpoint"
    return "stopped", ""


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of a JSON Lines file; invalid lines, and one that is being written, are left out."""
    if not is_file(path):
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[size > TAIL_BYTES :]
    return [row for line in lines if line.strip() and (row := parse_row(line)) is not None and is_row(row)]
