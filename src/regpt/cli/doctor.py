"""`regpt doctor`: what this machine can do, tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_json, status
from regpt.ranges import LONG, Range

if TYPE_CHECKING:
    from regpt.tools.doctor.doctor import Trial

SIGNS = {"ok": ("✓", "green"), "no": ("✗", "yellow"), "note": ("·", "dim")}


@dataclass(frozen=True)
class DoctorArgs:
    """Try a training step on every device, in every number format, compiled and fused, and a collective; name
    missing extras. Less than a minute; exit code 1 only where nothing can train."""

    trial_seconds: Annotated[float | None, tyro.conf.arg(metavar="SECONDS"), Range(0, LONG, above=True)] = None
    """Longest time of each group of trials; default: 20 to 120 seconds, five times what is usual."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(DoctorArgs, args, prog="regpt doctor")
    from regpt.tools.doctor.doctor import can_train, examine_machine

    with status() as say:
        say("looking at the host")
        trials = examine_machine(Path.cwd(), lambda group: say(f"looked at {group}"), given.trial_seconds)
    if given.json:
        print_json({"can_train": can_train(trials), "trials": [asdict(trial) for trial in trials]})
    else:
        show(trials)
    return 0 if can_train(trials) else 1


def show(trials: Sequence[Trial]) -> None:
    """One line a trial, under the headings of its group in the order in which these first occur."""
    from rich.text import Text

    from regpt.console.drawing import PlainConsole
    from regpt.tools.doctor.doctor import can_train

    console = PlainConsole()
    for group in dict.fromkeys(trial.group for trial in trials):
        console.print(Text(group, style="bold"), soft_wrap=True)
        shown = [trial for trial in trials if trial.group == group]
        width = max(len(trial.name) for trial in shown)
        for trial in shown:
            sign, style = SIGNS[trial.status]
            console.print(Text.assemble("  ", (sign, style), f" {trial.name:<{width}}  {trial.detail}"), soft_wrap=True)
    verdict = "this machine can train" if can_train(trials) else "nothing on this machine can train: see ✗ above"
    console.print(Text(verdict, style="bold"), soft_wrap=True)
