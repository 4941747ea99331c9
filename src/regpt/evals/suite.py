"""Tasks that are reported together, from what the user named to rows of metrics."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regpt.errors import UsageError
from regpt.evals.choices import open_choices
from regpt.evals.core import locate, open_core, summarize
from regpt.evals.hellaswag import open_hellaswag
from regpt.evals.specs import Spec
from regpt.evals.task import Result, Task, Tolerate, refuse
from regpt.prepare.sources import DownloadProgress
from regpt.text.fast import accelerate
from regpt.text.tokenizer import Encoder, Tokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        name: `hellaswag`, `core`, or the name of a user's file.
        tasks: what it consists of.
        summarize: rows about all of them together, beside those of each.
        seconds: what reading and encoding took.
    """

    name: str
    tasks: tuple[Task, ...]
    summarize: Callable[[Sequence[Result]], list[Row]] = lambda results: []
    seconds: float = 0.0


def open_suites(
    specs: Iterable[Spec],
    tokenizer: Tokenizer,
    progress: DownloadProgress | None = None,
    tolerate: Tolerate = refuse,
) -> list[Suite]:
    """The tasks that `specs` name, read, checked and encoded; by gigatoken where it is installed.

    Args:
        tolerate: receives the name of a task of CORE whose file is damaged, and the error; its neighbours are read.

    Raises:
        UserError: a file that cannot be had, or malformed items.
    """
    suites: list[Suite] = []
    specs = list(specs)
    if not specs:
        return suites  # a run without tasks writes no temporary file
    with tempfile.TemporaryDirectory() as folder:
        encoder = accelerate(tokenizer, Path(folder))
        for spec in specs:
            started = time.perf_counter()
            suite = open_suite(spec, encoder, tokenizer.eot, progress, tolerate)
            if suite.tasks:
                suites.append(replace(suite, seconds=time.perf_counter() - started))
    return suites


def open_suite(
    spec: Spec, encoder: Encoder, eot: int, progress: DownloadProgress | None, tolerate: Tolerate = refuse
) -> Suite:
    path = Path(spec.argument)
    if spec.kind == "hellaswag":
        return Suite("hellaswag", (open_hellaswag(path if spec.argument else None, encoder, eot, progress),))
    if spec.kind == "mc":
        return Suite(str(spec), (open_choices(path, str(spec), encoder, eot),))
    if spec.kind == "core":
        folder, chosen = locate(spec.argument)
        tasks, missing = open_core(folder, encoder, eot, chosen, tolerate)
        return Suite("core", tuple(tasks), lambda results: summarize(results, missing))
    raise UsageError(f"task {str(spec)!r} cannot be evaluated here; see regpt eval --help")


def suite_rows(suite: Suite, results: Sequence[Result]) -> list[Row]:
    """Rows of `metrics.jsonl` without kind and step: one a task and metric, then those of the suite."""
    rows = [
        {"task": one.task, "metric": metric, "value": found.value, "stderr": found.stderr, "n": found.n}
        for one in results
        for metric, found in one.estimates().items()
    ]
    more = {one.task: {"seconds": one.seconds, "cut": one.cut, "left_out": one.left_out} for one in results}
    kept = {task: {key: x for key, x in each.items() if x or key == "seconds"} for task, each in more.items()}
    return [*(row | kept[row["task"]] for row in rows), *suite.summarize(results)]
