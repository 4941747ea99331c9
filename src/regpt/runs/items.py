"""Files of what every item of a task gave: RUN/evals/TASK-step-00000250.jsonl."""

import re
from pathlib import Path


def write_items(folder: Path, task: str, lines: str, step: int) -> Path:
    """The file of `task` at `step`, in the place of those of earlier steps: the last one is compared."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[/:\\]", "-", task)
    path = folder / f"{name}-step-{step:08d}.jsonl"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(path)
    for other in folder.glob(f"{name}-step-*.jsonl"):
        if re.fullmatch(re.escape(name) + r"-step-\d{8}\.jsonl", other.name) and other < path:
            other.unlink()
    return path
