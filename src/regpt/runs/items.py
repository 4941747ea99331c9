"""Files of what every item of a task gave: RUN/evals/TASK-step-00000250.jsonl."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # a read-only disk
            temporary.unlink(missing_ok=True)
        raise
    for other in folder.glob(f"{name}-step-*.jsonl"):
        if re.fullmatch(re.escape(name) + r"-step-\d{8}\.jsonl", other.name) and other < path:
            other.unlink()
    return path
