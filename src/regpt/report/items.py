"""Scores of single items, which a run keeps so that two runs can be compared item by item."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.report.read import Run, number

Items = dict[Hashable, dict[str, Any]]


def item_file(run: Run, task: str, step: int) -> Path | None:
    """The file under RUN/evals with the items of `task` after `step` updates, if the run has kept it. One of another
    step may be left from before the run went back."""
    path = run.folder / "evals" / f"{task_file_name(task)}-step-{step:08d}.jsonl"
    return path if path.is_file() else None


def task_file_name(task: str) -> str:
    """`core-piqa` for `core/piqa`: no separators in a file's name."""
    return re.sub(r"[/:\\]", "-", task)


def read_items(path: Path) -> Items:
    """Item → its row.

    Raises:
        UserError: a line that is not an object with an `item`, or an item twice.
    """
    items: Items = {}
    for i, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        row = parse_item(line)
        if row is None:
            raise UserError(f"{path} line {i} is no object with an 'item'; evaluate that checkpoint again")
        item = row["item"]
        if item in items:
            raise UserError(f"{path} line {i} holds item {item!r} again; evaluate that checkpoint again")
        items[item] = row
    return items


def parse_item(line: bytes) -> dict[str, Any] | None:
    """One line as an object with an `item`, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("item"), (str, int)) else None


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
