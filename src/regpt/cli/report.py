"""`regpt report`: one run, or several over each other, as one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line
from regpt.errors import UsageError
from regpt.files import resolved
from regpt.ranges import MANY, Range
from regpt.remote import is_address


@dataclass(frozen=True)
class ReportArgs:
    """Write a run's report: what happened, charts, samples, configuration and origin in one HTML file. Several runs are
    drawn over each other."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, made by `regpt train`, or addresses of some (s3://…)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """HTML file to write; default RUN/report.html for one run, RUN/timelapse.html with --timelapse."""
    timelapse: bool = False
    """Write a page of another kind: the same prompts with the same noise by each checkpoint that the run keeps, under a
    slider."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = ()
    """With --timelapse: what the texts begin with; default: the prompts of the run's configuration."""
    new_tokens: Annotated[int, Range(0, MANY)] = 0
    """With --timelapse: tokens of each text; 0: 100, or what fits."""


def main(args: list[str]) -> int:
    given = parse(ReportArgs, args, prog="regpt report")
    if not given.runs:
        raise UsageError("no run was given; regpt report RUN, the folder that regpt train --out made")
    refuse_other_than_html(given.out)
    if given.timelapse:
        run, *others = given.runs
        if others or is_address(run):
            raise UsageError("--timelapse takes one run folder of this machine, whose checkpoints it reads")
        from regpt.runs.timelapse import write_timelapse

        print_line(write_timelapse(Path(run), given.out, given.prompts, given.new_tokens))
        return 0
    if given.prompts or given.new_tokens:
        raise UsageError("--prompts and --new-tokens are of a time lapse; add --timelapse, or leave them out")
    from regpt.checkpoint.fetch import local_run
    from regpt.report.page import write_overlay, write_report

    if len(given.runs) == 1 and given.out is None and is_address(given.runs[0]):
        raise UsageError(f"a report is not written to {given.runs[0]}; add --out FILE.html")
    if len(given.runs) == 1:
        print_line(write_report(local_run(given.runs[0]), given.out))
        return 0
    if given.out is None:
        raise UsageError(f"{len(given.runs)} runs make one report that belongs to none of them; add --out FILE.html")
    refuse_twice(given.runs)
    print_line(write_overlay([local_run(run) for run in given.runs], given.out))
    return 0


def refuse_other_than_html(out: Path | None) -> None:
    """Raise a UsageError for the name of another kind of file, such as RUN/config.toml, which would be replaced."""
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {str(out)!r} is no name of an HTML file; end it in .html")


def refuse_twice(runs: Sequence[str]) -> None:
    """Raise a UsageError for a run, by folder or address, that is given twice."""
    seen: set[str] = set()
    for run in runs:
        place = run.rstrip("/") if is_address(run) else str(resolved(run))
        if place in seen:
            raise UsageError(f"run folder {run!r} is given twice; give each run once")
        seen.add(place)
