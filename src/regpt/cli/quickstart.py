"""`regpt quickstart`: text to a trained, evaluated and sampled model on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from regpt.cli.parse import parse
from regpt.ranges import MANY, Range


@dataclass(frozen=True)
class Quickstart:
    """Train a small GPT on the Python documentation of this machine: no download, about two minutes on two cores."""

    out: str = ""
    """New folder for the run; by default the next free runs/quickstart-001, -002, …"""
    steps: Annotated[int | None, Range(1, MANY)] = None
    """Updates; by default the recipe's."""


def main(args: list[str]) -> int:
    given = parse(Quickstart, args, prog="regpt quickstart")
    from regpt.files import unused
    from regpt.runs.quickstart import quickstart

    run = Path(given.out) if given.out else unused(Path("runs/quickstart"), "-{:03d}")
    return quickstart(run, steps=given.steps, argv=["regpt", "quickstart", *args])
