"""Tasks that are reported together, from what the user named to rows of metrics."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.data.sources import DownloadProgress
from regpt.errors import UsageError
from regpt.evals.choices import open_choices
from regpt.evals.hellaswag import open_hellaswag
from regpt.evals.specs import Spec
from regpt.evals.task import Result, Task
from regpt.text.tokenizer import Tokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        name: `hellaswag`, `core`, or the name of a user's file.
        tasks: what it consists of.
        summarize: rows about all of them together, beside those of each.
    """

    name: str
    tasks: tuple[Task, ...]
    summarize: Callable[[Sequence[Result]], list[Row]] = lambda results: []


def open_suite(spec: Spec, tokenizer: Tokenizer, progress: DownloadProgress | None = None) -> Suite:
    """The tasks that `spec` names, read and checked.

    Raises:
        UserError: a file that cannot be had, or malformed items.
    """
    path = Path(spec.argument)
    if spec.kind == "hellaswag":
        return Suite("hellaswag", (open_hellaswag(path if spec.argument else None, tokenizer, progress),))
    if spec.kind == "mc":
        return Suite(str(spec), (open_choices(path, str(spec), tokenizer),))
    raise UsageError(f"task {str(spec)!r} cannot be evaluated here; see regpt eval --help")


def rows_of(results: Iterable[Result]) -> list[Row]:
    """One row a task and metric, as `metrics.jsonl` keeps them (without kind and step)."""
    return [
        {"task": result.task, "metric": metric, "value": found.value, "stderr": found.stderr, "n": found.n}
        for result in results
        for metric, found in result.estimates().items()
    ]
