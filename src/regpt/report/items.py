"""Scores of single items, which a run keeps so that two runs can be compared item by item."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from regpt.report.read import Run, number, say_left_out
from regpt.structured import json_lines

Items = dict[Hashable, dict[str, Any]]


def kept_items(run: Run, task: str, step: int) -> Items | None:
    """The items of `task` after `step` updates, under RUN/evals; None where the run has not kept them, or has just
    replaced them by those of a later step. Those of another step may be left from before the run went back."""
    path = run.folder / "evals" / f"{task_file_name(task)}-step-{step:08d}.jsonl"
    try:
        return read_items(path)
    except FileNotFoundError:
        return None


def task_file_name(task: str) -> str:
    """`core-piqa` for `core/piqa`: no separators in a file's name."""
    return re.sub(r"[/:\\]", "-", task)


def read_items(path: Path) -> Items:
    """Item → its row; a warning counts lines that are no objects with an `item`, or have one again."""
    items: Items = {}
    odd = []
    for line, row, _ in json_lines(path):
        item = row.get("item") if row else None
        if row is None or not isinstance(item, (str, int)) or item in items:
            odd.append(line)
        else:
            items[item] = row
    say_left_out(path, odd)
    return items


def common_scores(a: Items, b: Items, key: str) -> tuple[list[float], list[float]] | None:
    """The values of `key` of the items that both have, in one order; None where there are none."""
    pairs = [
        (x, y)
        for item, row in a.items()
        if item in b and (x := score(row, key)) is not None and (y := score(b[item], key)) is not None
    ]
    return ([x for x, _ in pairs], [y for _, y in pairs]) if pairs else None


def score(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, bool) else number(value)
