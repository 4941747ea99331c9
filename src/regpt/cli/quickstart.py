"""`regpt quickstart`: text to a trained, evaluated and sampled model on this machine."""

from dataclasses import dataclass
from pathlib import Path

from regpt.cli.parse import parse
from regpt.errors import UsageError


@dataclass(frozen=True)
class Quickstart:
    """Train a small GPT on the Python documentation of this machine: no download, about two minutes on two cores."""

    out: str = ""
    """New folder for the run; by default the next free runs/quickstart-001, -002, …"""
    steps: int | None = None
    """Updates; by default the recipe's."""


def main(args: list[str]) -> int:
    given = parse(Quickstart, args, prog="regpt quickstart")
    if given.steps is not None and given.steps < 1:
        raise UsageError(f"--steps is {given.steps}, must be at least 1")
    from regpt.runs.folder import numbered_folder
    from regpt.runs.quickstart import quickstart

    run = Path(given.out) if given.out else numbered_folder(Path("runs"), "quickstart")
    return quickstart(run, steps=given.steps, argv=["regpt", "quickstart", *args])
