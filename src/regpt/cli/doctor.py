"""`regpt doctor`: what this machine can do, tried."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from regpt.cli.parse import parse

if TYPE_CHECKING:
    from regpt.tools.doctor.doctor import Findings

SIGNS = {"ok": ("✓", "green"), "no": ("✗", "yellow"), "note": ("·", "dim")}


@dataclass(frozen=True)
class DoctorArgs:
    """Try what training needs on this machine: devices, precisions, attention, torch.compile, processes; measure
    products, memory and disk; name missing extras. Less than a minute; exit code 1 only where nothing can train."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(DoctorArgs, args, prog="regpt doctor")
    from rich.console import Console

    from regpt.tools.doctor.doctor import examine

    with Console(stderr=True).status("looking at the host") as status:
        findings = examine(Path.cwd(), lambda group: status.update(f"looked at {group}, going on"))
    if given.json:
        print(json.dumps({"can_train": findings.can_train, "trials": [asdict(trial) for trial in findings.trials]}))
    else:
        show(findings)
    return 0 if findings.can_train else 1


def show(findings: Findings) -> None:
    """One line a trial, under its heading."""
    from rich.console import Console
    from rich.text import Text

    from regpt.tools.doctor.doctor import by_group

    console = Console(highlight=False, soft_wrap=True)
    for group, trials in by_group(findings.trials).items():
        console.print(Text(group, style="bold"))
        width = max(len(trial.name) for trial in trials)
        for trial in trials:
            sign, style = SIGNS[trial.status]
            console.print(Text.assemble("  ", (sign, style), f" {trial.name:<{width}}  {trial.detail}"))
    verdict = "this machine can train" if findings.can_train else "nothing on this machine can train: see ✗ above"
    console.print(Text(verdict, style="bold"))
