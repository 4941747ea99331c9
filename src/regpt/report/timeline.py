"""The timeline of a run: after a step back (resume from an older checkpoint, rewind) earlier rows of later steps do not
count."""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from regpt.checkpoint.best import STEPS_BACK

Row = dict[str, Any]
HISTORY = ("epochs", "checkpoint")  # events of a timeline; others are a record of what happened, and stay


class StepBack(NamedTuple):
    """Before row `place` of a file the run went back to `step`; `time` in Unix seconds, infinite where unknown."""

    place: int
    step: int
    time: float


def steps_back(rows: Sequence[Row]) -> list[StepBack]:
    """Where the run went back, by its events; in files without them, by two updates in a row that were made before.
    One such row alone is out of order, and no step back."""
    found = []
    highest, last, again = 0, 0, False
    for place, row in enumerate(rows):
        kind, step = row.get("kind"), row["step"]
        if kind == "event" and row.get("name") in STEPS_BACK:
            found.append(StepBack(place, step, time_of(row)))
            highest, again = min(highest, step), False
        elif kind == "train":
            made_before = step <= highest
            if made_before and again and step > rows[last]["step"]:
                found.append(StepBack(last, rows[last]["step"] - 1, time_of(rows[last])))
                highest, again = step, False
            else:
                again = made_before
            highest, last = max(highest, step), place
    return found


def current(rows: Sequence[Row], back: Sequence[StepBack]) -> list[Row]:
    """The rows of `metrics.jsonl` that count."""
    limits = [inf] * (len(rows) + 1)  # the lowest step that the run goes back to after a row
    for place, step, _ in back:
        limits[place] = min(limits[place], step)
    for place in reversed(range(len(rows))):
        limits[place] = min(limits[place], limits[place + 1])
    return [row for row, limit in zip(rows, limits[1:]) if row["step"] <= limit or is_record(row)]


def is_record(row: Row) -> bool:
    return row.get("kind") == "event" and row.get("name") not in HISTORY


def current_samples(samples: Sequence[Row], back: Sequence[StepBack], last_step: int) -> list[Row]:
    """The rows of `samples.jsonl` that count, of a run whose last row has the step `last_step`. One that never went
    back may have sampled beyond it: it may log only some updates (`log.every_steps`)."""
    return [
        row
        for row in samples
        if (not back or row["step"] <= last_step)
        and not any(row["step"] > one.step and time_of(row) < one.time < inf for one in back)
    ]


def time_of(row: Row) -> float:
    time = row.get("time")
    return float(time) if isinstance(time, int | float) and not isinstance(time, bool) else inf
