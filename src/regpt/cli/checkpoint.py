"""`regpt checkpoint`: the checkpoints of a run, and whether they are intact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from regpt.cli.parse import local_folder, parse, run_subcommand
from regpt.console.lines import print_json, print_line, print_rows, status
from regpt.errors import UsageError, UserError, word
from regpt.files import exists, is_file, is_folder

if TYPE_CHECKING:
    from regpt.checkpoint.damage import Damage, Listed


@dataclass(frozen=True)
class ListArgs:
    """List the checkpoints of a run: step, date, size, and whether all files are there in their sizes."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder; nothing in it changes."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


@dataclass(frozen=True)
class CheckpointVerifyArgs:
    """Read every file of a run's checkpoints, or of one: size, SHA-256, format, shapes, numbers that are not finite.
    Exit code 1 if one is damaged."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """A run's folder, or that of one checkpoint; nothing in it changes."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    """Call the subcommand."""
    commands = {
        "list": (list_main, "steps, dates and sizes of a run's checkpoints"),
        "verify": (verify_main, "read every file of a run's checkpoints, or of one"),
    }
    return run_subcommand("regpt checkpoint", args, commands)


def list_main(args: list[str]) -> int:
    given = parse(ListArgs, args, prog="regpt checkpoint list")
    from regpt.checkpoint.damage import list_checkpoints
    from regpt.runs.folder import is_run

    run = local_folder(given.run, "regpt checkpoint")
    listed = list_checkpoints(run)
    if not listed and not is_run(run):
        raise UsageError(
            f"{given.run!r} {'is no run' if is_folder(run) else 'does not exist'}; give the folder of a run"
        )
    if given.json:
        print_json({"run": given.run, "checkpoints": [asdict(one) for one in listed]})
    else:
        print_list(given.run, listed)
    return 0


def print_list(run: str, listed: list[Listed]) -> None:
    rows = [
        [one.name, "" if one.step is None else f"{one.step:,}", local_time(one.written), size(one.bytes), state_of(one)]
        for one in listed
    ]
    if not rows:
        print_line(f"{run} has no checkpoint yet")
        return
    print_rows(["checkpoint", "step", "written", "size", "state"], rows, left=(0, 4))
    print_line(f"regpt checkpoint verify {word(run)} reads them too")


def state_of(one: Listed) -> str:
    if one.kind == "checkpoint":
        loss = "" if one.loss is None else f", validation loss {one.loss:.4f}" + ", the best" * one.best
        return f"incomplete: {one.problem}" if one.problem else "complete" + ", with average" * one.average + loss
    return "damaged, set aside" if one.kind == "set aside" else "being written, or left by a crash"


def verify_main(args: list[str]) -> int:
    given = parse(CheckpointVerifyArgs, args, prog="regpt checkpoint verify")
    from regpt.checkpoint.damage import find_damages

    found: dict[Path, list[Damage]] = {}
    with status(quiet=given.json) as say:
        while not found:  # again where all were pruned meanwhile: newer ones are there
            folders = chosen(local_folder(given.path, "regpt checkpoint"))
            found = find_damages(folders, lambda folder, file: say(f"reading {folder.name}/{file}"))
    damaged = [folder for folder, damage in found.items() if damage]
    if given.json:
        checkpoints = [
            {"name": folder.name, "intact": not damage, "damage": [asdict(one) for one in damage]}
            for folder, damage in found.items()
        ]
        print_json({"path": given.path, "intact": not damaged, "checkpoints": checkpoints})
        return int(bool(damaged))
    for folder, damage in found.items():
        print_line(f"{folder.name}  {'DAMAGED' if damage else 'intact'}")
        for one in damage:
            print_line(f"  {one.file}: {one.what}")
    if damaged:
        raise UserError(verdict([*found], damaged))
    return 0


def chosen(path: Path) -> list[Path]:
    """The checkpoints of the run `path`, or the one that it is."""
    from regpt.checkpoint.best import named_checkpoint
    from regpt.checkpoint.load import CHECKPOINTS, STEP_FOLDER, checkpoints
    from regpt.checkpoint.manifest import MANIFEST, MODEL

    path = named_checkpoint(str(path))
    if is_folder(path / CHECKPOINTS):
        if folders := checkpoints(path):
            return folders
        raise UserError(f"run {str(path)!r} has no checkpoint yet; wait for the first, or give another run")
    if is_folder(path) and (STEP_FOLDER.fullmatch(path.name) or is_file(path / MANIFEST) or is_file(path / MODEL)):
        return [path]
    what = "is neither a run with checkpoints nor a checkpoint" if exists(path) else "does not exist"
    raise UsageError(f"{str(path)!r} {what}; give the folder of a run, or RUN/checkpoints/step-…")


def verdict(folders: list[Path], damaged: list[Path]) -> str:
    """One sentence: how much is damaged, and what a resume would do."""
    names = ", ".join(folder.name for folder in damaged)
    if len(folders) == 1:
        return f"checkpoint {names} is damaged; restore the files named above, or use another checkpoint"
    intact = [folder for folder in folders if folder not in damaged]
    goes_on = f"a resume goes on from {intact[-1].name}" if intact else "no resume is possible"
    return f"{len(damaged)} of {len(folders)} checkpoints are damaged ({names}); restore their files; {goes_on}"


def local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"
