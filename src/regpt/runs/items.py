"""Files of what every item of a task gave: RUN/evals/TASK-step-00000250.jsonl."""

import re
from collections.abc import Callable
from pathlib import Path

from regpt.files import write_text


def keep_items(folder: Path, task: str, lines: str, step: int, say: Callable[[str], None]) -> None:
    """`write_items` for a run, which goes on without the file where that cannot be written, and says so."""
    try:
        write_items(folder, task, lines, step)
    except OSError as error:
        say(f"the items of {task} after step {step:,} are not kept: cannot write {str(folder)!r} ({error.strerror})")


def write_items(folder: Path, task: str, lines: str, step: int) -> Path:
    """The file of `task` at `step`, in the place of those of earlier steps: the last one is compared."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[/:\\]", "-", task)
    path = folder / f"{name}-step-{step:08d}.jsonl"
    write_text(path, lines)
    for other in folder.glob(f"{name}-step-*.jsonl"):
        if re.fullmatch(re.escape(name) + r"-step-\d{8}\.jsonl", other.name) and other < path:
            other.unlink()
    return path
