"""Files of the outcome of every item of a task: RUN/evals/TASK-step-00000250.jsonl (see `regpt.report.read`)."""

import re
from collections.abc import Callable
from pathlib import Path

from regpt.files import write_text
from regpt.report.read import item_file


def keep_items(folder: Path, task: str, lines: str, step: int, say: Callable[[str], None]) -> None:
    """`write_items` for a run, which continues without the file where that cannot be written, and reports it."""
    try:
        write_items(folder, task, lines, step)
    except OSError as error:
        say(f"the items of {task} after step {step:,} are not kept: cannot write {str(folder)!r} ({error.strerror})")


def write_items(folder: Path, task: str, lines: str, step: int) -> Path:
    """Write the file of `task` at `step` instead of those of earlier steps: the last one is compared."""
    folder.mkdir(parents=True, exist_ok=True)
    path = item_file(folder, task, step)
    write_text(path, lines)
    name = path.name.rpartition("-step-")[0]
    for other in folder.iterdir():
        if re.fullmatch(re.escape(name) + r"-step-\d{8}\.jsonl", other.name) and other < path:
            other.unlink()
    return path
