"""Tasks that are reported together, from the names that a user typed to rows of metrics."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from regpt.errors import UsageError, UserError, import_extra
from regpt.evals.chat.tasks import chat_options
from regpt.evals.choices import open_choices, open_hellaswag
from regpt.evals.core import locate, open_core, summarize
from regpt.evals.needle import Needle, needle_options
from regpt.evals.score import Progress, Scorer
from regpt.evals.specs import Spec
from regpt.evals.task import Result, Task, Tolerate, evaluate_task, refuse, truncation_notice
from regpt.remote.download import DownloadProgress
from regpt.text.chat import ChatTemplate
from regpt.text.fast import accelerate
from regpt.text.tokenizer import Encoder, Tokenizer

Row = dict[str, Any]
# show(name) is a context that gives a progress function: (done, total).
ShowProgress = Callable[[str], AbstractContextManager[Progress]]


@dataclass
class Suite:
    """
    Attributes:
        name: `hellaswag`, `core`, or the name of a user's file.
        tasks: its parts.
        summarize: rows about all of them together, next to those of each.
        seconds: of reading and encoding.
        more: what a row of a result and metric holds besides.
    """

    name: str
    tasks: tuple[Task, ...]
    summarize: Callable[[Sequence[Result]], list[Row]] = lambda results: []
    seconds: float = 0.0
    more: Callable[[Result, str], Row] = lambda result, metric: {}

    def evaluate(self, scorer: Scorer, show: ShowProgress, max_items: int) -> list[Result]:
        """The result of every task, on `max_items` items (0: all)."""
        results = []
        for task in self.tasks:
            with show(task.name) as progress:
                results.append(evaluate_task(task, scorer, max_items=max_items, progress=progress))
        return results

    def notices(self, results: Sequence[Result], max_seq_len: int) -> list[str]:
        """Sentences about items that a model of `max_seq_len` did not see whole, and about tasks that are missing."""
        missing = [row["missing"] for row in self.summarize(results) if row.get("missing")]
        why = "missing, so this is not the metric of all tasks"
        absent = [f"{self.name}: {', '.join(names)} {why}" for names in missing]
        return [*absent, *truncation_notice(results, max_seq_len)]


class HarnessChats(NamedTuple):
    """Whether, and how, lm-eval's tasks are asked as chats; its own names."""

    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str = ""
    template: ChatTemplate | None = None


TEXTS = HarnessChats()


def refuse_base(what: str = "--apply-chat-template") -> NoReturn:
    """Raise a UserError for a model that was not trained to answer."""
    raise UserError(
        f"the model has no chat template, so it was not trained to answer, and {what} asks for replies; train it "
        "on conversations first (regpt finetune RECIPE --init-from MODEL --data FILE --out RUN)"
    )


def open_suites(
    specs: Iterable[Spec],
    tokenizer: Tokenizer,
    progress: DownloadProgress | None = None,
    tolerate: Tolerate = refuse,
    max_seq_len: int = 1024,
    template: ChatTemplate | None = None,
    chats: HarnessChats = TEXTS,
    answers: Callable[[Spec], Suite] | None = None,
) -> list[Suite]:
    """The tasks that `specs` name, but `val`: read, checked and encoded, by gigatoken where it is installed.

    Args:
        tolerate: receives the name of a task of CORE whose file is damaged, and the error; its neighbours are read.
        max_seq_len: tokens that the model reads, for tasks of its length.
        template: the model's, for chat tasks.
        chats: of lm-eval's tasks.
        answers: opens the held-out answers of a file of conversations.

    Raises:
        UserError: a file that cannot be had, or malformed items.
    """
    suites: list[Suite] = []
    specs = [spec for spec in specs if spec.kind != "val"]
    if not specs:
        return suites  # a run without tasks writes no temporary file
    with tempfile.TemporaryDirectory() as folder:
        encoder = accelerate(tokenizer, Path(folder))
        for spec in specs:
            started = time.perf_counter()
            if spec.kind == "lm-eval":
                suites.append(open_harness(spec, tokenizer, tolerate, chats._replace(template=template)))
                continue
            if spec.kind == "chat":
                suites.append(open_chat(spec, template))
                continue
            if spec.kind == "conversations" and answers:
                started = time.perf_counter()
                suites.append(answers(spec))
                suites[-1].seconds = time.perf_counter() - started
                continue
            if spec.kind == "needle":
                needle = Needle(needle_options(spec.argument), encoder, max_seq_len)
                suites.append(Suite("needle", (needle,), more=needle.by_cell, seconds=time.perf_counter() - started))
                continue
            suite = open_suite(spec, encoder, tokenizer.eot, progress, tolerate)
            if suite.tasks:
                suites.append(replace(suite, seconds=time.perf_counter() - started))
    return suites


def open_harness(spec: Spec, tokenizer: Tokenizer, tolerate: Tolerate, chats: HarnessChats) -> Suite:
    """Tasks of lm-eval; a UserError where it is not installed."""
    harness = import_extra("regpt.evals.harness", "lm-eval is not installed", "lm-eval")
    names = [name.strip() for name in spec.argument.split(",") if name.strip()]
    return harness.HarnessSuite(names, tokenizer, tolerate, chats)


def open_chat(spec: Spec, template: ChatTemplate | None) -> Suite:
    """A chat task; a UserError for a model that was not trained to answer."""
    from regpt.evals.chat.suite import ChatSuite

    return ChatSuite(chat_options(spec.argument), template or refuse_base(str(spec)))


def open_suite(spec: Spec, encoder: Encoder, eot: int, progress: DownloadProgress | None, tolerate: Tolerate) -> Suite:
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
        {"task": one.task, "metric": metric, **asdict(found), "seconds": one.seconds}
        | {key: n for key, n in (("cut", one.cut), ("left_out", one.left_out)) if n}
        | suite.more(one, metric)
        for one in results
        for metric, found in one.estimates().items()
    ]
    return [*rows, *suite.summarize(results)]
