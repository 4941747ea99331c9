"""The names of tasks, as they are typed: `val,hellaswag,core:DIR,mc:FILE,lm-eval:arc_easy,piqa`."""

from collections.abc import Iterable
from typing import NamedTuple

from regpt.errors import UsageError, nearest

KINDS = {
    "val": "the held-out split of the data",
    "hellaswag": "the official file, or hellaswag:FILE",
    "core": "core:DIR, a folder with core.json",
    "mc": "mc:FILE, multiple-choice questions",
    "lm-eval": "lm-eval:TASK,TASK…, the rest of the list",
}
NEED = {"core": "DIR", "mc": "FILE", "lm-eval": "TASK"}


class Spec(NamedTuple):
    """One task: its kind, and the file, folder or names behind the colon, empty where there are none."""

    kind: str
    argument: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


def parse_tasks(given: str) -> list[Spec]:
    """The tasks in a list with commas; everything behind `lm-eval:` is its.

    Raises:
        UsageError: an unknown name, one that lacks its file, or one given twice.
    """
    ours, marker, theirs = given.partition("lm-eval:")
    names = [name.strip() for name in ours.split(",")]
    if marker:
        names = [*names[:-1], *([names[-1]] if names[-1] else []), f"lm-eval:{theirs.strip()}"]
    return check_specs(names)


def check_specs(names: Iterable[str]) -> list[Spec]:
    """The same of a list of names."""
    specs = []
    for name in names:
        kind, colon, argument = name.partition(":")
        if kind not in KINDS:
            known = "; ".join(f"{kind} ({what})" for kind, what in KINDS.items())
            raise UsageError(f"task {name!r} is unknown{nearest(kind, KINDS)}; choose from {known}")
        if kind in NEED and not argument:
            raise UsageError(f"task {kind!r} needs to know which; give {kind}:{NEED[kind]}")
        if kind == "val" and colon:
            raise UsageError(f"task {name!r}: val takes nothing behind a colon; choose the folder with --data")
        specs.append(Spec(kind, argument))
    for spec in specs:
        if specs.count(spec) > 1:
            raise UsageError(f"task {str(spec)!r} is given twice; give it once")
    return specs
