"""The rows of a run's metrics.jsonl, read while it may still be written, or after a crash."""

from pathlib import Path
from typing import Any

from regpt.files import is_file
from regpt.structured import json_lines


def last_rows(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Step → row of that kind; where a step occurs twice the last one counts, and no torn line does."""
    path = run / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for _, row, ended in json_lines(path) if is_file(path) else ():
        if row and ended and row.get("kind") == kind and "source" not in row and type(row.get("step")) is int:
            found[row["step"]] = row
    return found
