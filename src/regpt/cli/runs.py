"""`regpt runs`: every run below a folder, with its state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import duration
from regpt.errors import UsageError
from regpt.files import is_folder

if TYPE_CHECKING:
    from regpt.runs.listing import ListedRun


@dataclass(frozen=True)
class RunsArgs:
    """List the runs below a folder: state, step, loss, speed, age. Nothing in them changes."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "runs"
    """Folder that holds runs, or one run."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(RunsArgs, args, prog="regpt runs")
    from regpt.runs.listing import list_runs

    if not is_folder(given.folder):
        raise UsageError(f"the folder {given.folder!r} does not exist; give one that holds runs: regpt runs FOLDER")
    found = list(list_runs(Path(given.folder)))
    if given.json:
        print_json({"folder": given.folder, "runs": [asdict(one) for one in found]})
    elif found:
        head = ["run", "state", "step", "loss", "tokens/s", "last row", ""]
        print_rows(head, [cells(one, given.folder) for one in found], left=(0, 1, 6))
    else:
        print_line(f"{given.folder} holds no run")
    return 0


def cells(one: ListedRun, folder: str) -> list[str]:
    name = one.run if Path(one.run) == Path(folder) else str(Path(one.run).relative_to(folder))
    steps = "?" if one.steps is None else f"{one.steps:,}"
    return [
        name,
        one.state,
        "" if one.step is None else f"{one.step:,}/{steps}",
        "" if one.loss is None else f"{one.loss:.4f}",
        "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
        "" if one.age_s is None else duration(round(one.age_s)),
        one.note,
    ]
