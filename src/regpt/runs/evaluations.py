"""Tasks of `eval.tasks` while a model trains: on the raw module, by functions of their own, without any generator."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from regpt.config import RunConfig
from regpt.evals.score import BATCH_TOKENS, Scorer
from regpt.evals.suite import Row, Suite, open_suites, suite_rows
from regpt.evals.task import Result, evaluate, refuse_long_endings
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.runs.items import write_items
from regpt.text.tokenizer import Tokenizer
from regpt.train.precision import autocast


class Evaluations:
    """The tasks of a run; `rows(step)` evaluates them once.

    Under a budget of seconds the first evaluation finds out how many items it allows; later ones, and those after a
    resume, take the same items.

    Args:
        config, run: of the run. Items are written into RUN/evals by the main process.
        model: the raw module that is trained.
        say: shows a line.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        suites: Sequence[Suite],
        model: Transformer,
        mesh: Mesh,
        say: Callable[[str], None],
    ):
        self.config, self.run, self.suites, self.mesh, self.say = config, run, suites, mesh, say
        train = config.train
        kind = mesh.device.type
        rows = 1 if train.micro_batch_rows == "auto" else train.micro_batch_rows
        self.scorer = Scorer(
            model,
            mesh,
            autocast=lambda: autocast(train.precision, mesh.device),
            compile=train.compile and kind == "cuda",
            # No more memory than training takes: its micro-batches are of this size, and keep their activations.
            batch_tokens=min(BATCH_TOKENS[kind], max(1024, rows * config.data.seq_len)),
        )
        self.counts = counts_before(run / "metrics.jsonl")

    def rows(self, step: int) -> Iterator[Row]:
        """The rows of metrics of every task, one suite after another; all processes together."""
        limit = self.config.eval.max_seconds
        left, tasks_left = limit, sum(len(suite.tasks) for suite in self.suites)
        compiled = self.scorer.cost.compile_seconds
        for suite in self.suites:
            results = []
            for task in suite.tasks:
                share = max(0.01, left / tasks_left) if limit else 0.0
                results.append(self.evaluate(task, share))
                left, tasks_left = left - self.scorer.slowest(results[-1].seconds), tasks_left - 1
                if self.mesh.is_main:
                    write_items(self.run / "evals", task.name, results[-1].item_lines(), step)
            rows = suite_rows(suite, results)
            for row in rows:
                yield {"kind": "eval", "step": step, **row, "time": time.time()}
            self.say(headline(suite, results, step))
        if self.scorer.cost.compile_seconds > compiled:
            self.say(f"evaluation compiled in {self.scorer.cost.compile_seconds - compiled:.1f} s")

    def evaluate(self, task: Any, seconds: float) -> Result:
        known = self.counts.get(task.name)
        if known is None or not seconds:
            found = evaluate(task, self.scorer, max_items=self.config.eval.max_items, seconds=seconds)
        else:
            found = evaluate(task, self.scorer, max_items=known)
        self.counts[task.name] = len(found.chosen)
        return found


def open_run_suites(config: RunConfig, tokenizer: Tokenizer) -> list[Suite]:
    """What `eval.tasks` names.

    Raises:
        UserError: files that cannot be had, malformed items, or an ending longer than the model.
    """
    suites = open_suites(config.eval.specs(), tokenizer)
    for task in (task for suite in suites for task in suite.tasks):
        refuse_long_endings(task, config.model.max_seq_len)
    return suites


def counts_before(metrics: Path) -> dict[str, int]:
    """Task → items of its last evaluation in a run that goes on."""
    counts: dict[str, int] = {}
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        if b'"eval"' in line:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if row.get("kind") == "eval":
                counts[row["task"]] = row["n"]
    return counts


def headline(suite: Suite, results: Sequence[Result], step: int) -> str:
    """One line about a suite."""
    rows = suite.summarize(results) or suite_rows(suite, results)
    found = ", ".join(f"{row['metric']} {with_error(row['value'], row['stderr'])}" for row in rows)
    return f"{suite.name} after step {step:,}: {found}; {sum(result.seconds for result in results):.1f} s"


def with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
