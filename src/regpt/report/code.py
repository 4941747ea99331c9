"""Which files of the source two runs were made with differ, where the checkout that regpt runs from knows both."""

import subprocess
from pathlib import Path

import regpt
from regpt.report.read import Run


def changed_files(a: Run, b: Run) -> list[str] | None:
    """Paths of the package with lines added and removed, between the runs' commits; None where that is not known.

    A commit that ends in `+` had changes which nobody recorded: what is said is between the commits alone.
    """
    commits = [str(run.env.get("commit") or "").removesuffix("+") for run in (a, b)]
    if not all(commits):
        return None
    here = Path(regpt.__file__).parent
    command = ["git", "-C", str(here), "diff", "--numstat", "--relative", *commits, "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    lines = [line.split("\t", 2) for line in done.stdout.splitlines()]
    return [f"{path} +{added} -{removed}" for added, removed, path in lines]


def has_unrecorded_changes(run: Run) -> bool:
    return str(run.env.get("commit") or "").endswith("+")
