"""The rows of a run's metrics.jsonl, read while it may still be written, or after a crash."""

import json
from pathlib import Path
from typing import Any


def last_rows(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Step → row of that kind; where a step occurs twice the last one counts, and no torn line does."""
    path = run / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n"):
            continue
        row = json.loads(line)
        if row.get("kind") == kind and "source" not in row:
            found[int(row["step"])] = row
    return found
