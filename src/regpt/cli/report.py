"""`regpt report`: one run as one HTML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli.parse import parse


@dataclass(frozen=True)
class ReportArgs:
    """Write a run's report: losses, learning rate, gradient norm, speed, samples and configuration in one HTML file."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder, made by `regpt train`; one report shows exactly one run."""
    out: Path | None = None
    """HTML file to write; default RUN/report.html."""


def main(args: list[str]) -> int:
    given = parse(ReportArgs, args, prog="regpt report")
    from regpt.report.page import write_report

    print(write_report(given.run, given.out))
    return 0
