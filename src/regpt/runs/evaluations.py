"""Tasks of `eval.tasks` while a model trains: on the raw module, by separate functions, without any generator."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from regpt.config import RunConfig
from regpt.evals.score import BATCH_TOKENS, Scorer
from regpt.evals.suite import Row, Suite, open_suites, suite_rows
from regpt.evals.task import Result, Task, evaluate_task, refuse_if_nothing_fits, truncation_notice, with_error
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.runs.items import keep_items
from regpt.text.chat import ChatTemplate
from regpt.text.tokenizer import Tokenizer
from regpt.train.average import Average
from regpt.train.precision import autocast

OF_AVERAGE = "_ema"  # after the name of a metric


class RunEvaluations:
    """The tasks of a run; `rows(step)` evaluates them once.

    Args:
        config, run: of the run. Items are written into RUN/evals by the main process.
        model: the raw module that is trained.
        say: prints a line on the terminal.
        stop_requested: of this process; asked before each task, as all of them may take longer than the sender waits.
        average: of its weights; with `eval.ema` the same items are judged with it, too: metrics end in `_ema` then.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        suites: Sequence[Suite],
        model: Transformer,
        mesh: Mesh,
        say: Callable[[str], None],
        *,
        average: Average | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.stop_requested = stop_requested
        self.average = average if config.eval.ema else None
        self.config, self.run, self.suites, self.mesh, self.say = config, run, suites, mesh, say
        train = config.train
        kind = mesh.device.type
        rows = 1 if train.micro_batch_rows == "auto" else train.micro_batch_rows
        self.scorer = Scorer(
            model,
            mesh,
            autocast=lambda: autocast(train.autocast_precision, mesh.device),
            compile=train.compile and kind == "cuda",
            # No more memory than training takes: its micro-batches are of this size, and keep their activations.
            batch_tokens=min(BATCH_TOKENS[kind], max(1024, rows * config.data.seq_len)),
        )
        self.noticed: set[str] = set()
        self.most_items = config.eval.max_items

    def rows(self, step: int) -> Iterator[Row]:
        """The rows of metrics of every task, one suite after another; all processes together."""
        compiled = self.scorer.cost.compile_seconds
        for suite in self.suites:
            results = []
            for task in suite.tasks:
                if self.mesh.any(self.stop_requested()):
                    self.say(f"asked to stop: the evaluation after step {step:,} ends before {task.name}")
                    return
                results.append(self.evaluate(task))
            if not suite.tasks:  # of replies
                results = suite.evaluate(self.scorer, lambda name: nullcontext(lambda *done: None), self.most_items)
            averaged = self.averaged(suite)
            self.keep_items(results, averaged, step)
            of_average = suite_rows(suite, averaged) if averaged else []
            of_average = [row | {"metric": f"{row['metric']}{OF_AVERAGE}"} for row in of_average]
            for row in [*suite_rows(suite, results), *of_average]:
                yield {"kind": "eval", "step": step, **row, "time": time.time()}
            self.say(headline(suite, results, step))
            new = [one for one in results if one.task not in self.noticed]  # the notice is the same at every step
            self.noticed |= {one.task for one in new}
            for sentence in truncation_notice(new, self.config.model.max_seq_len):
                self.say(sentence)
            if averaged:
                self.say(f"with the average of the weights: {headline(suite, averaged, step)}")
        if self.scorer.cost.compile_seconds > compiled:
            self.say(f"evaluation compiled in {self.scorer.cost.compile_seconds - compiled:.1f} s")

    def averaged(self, suite: Suite) -> list[Result]:
        """The same items of each task, judged with the average of the weights; empty where it is not wanted, or before
        a stop."""
        results: list[Result] = []
        if self.average is None:
            return results
        with self.average.applied():
            for task in suite.tasks:
                if self.mesh.any(self.stop_requested()):
                    return []
                results.append(self.evaluate(task))
        return results

    def keep_items(self, results: Sequence[Result], averaged: Sequence[Result], step: int) -> None:
        """Write the outcome of each item, with both weights in one line."""
        if not self.mesh.is_main:
            return
        for i, one in enumerate(results):
            also = averaged[i].outcomes if averaged else {}
            both = one.outcomes | {f"{metric}{OF_AVERAGE}": values for metric, values in also.items()}
            keep_items(self.run / "evals", one.task, replace(one, outcomes=both).item_lines(), step, self.say)

    def evaluate(self, task: Task) -> Result:
        return evaluate_task(task, self.scorer, max_items=self.most_items)


def open_run_suites(config: RunConfig, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[Suite]:
    """Open the tasks that `eval.tasks` names; `template` is for chat tasks.

    Raises:
        UserError: files that cannot be had, malformed items, or nothing but endings longer than the model.
    """
    longest = config.model.max_seq_len
    suites = open_suites(config.eval.specs(), tokenizer, max_seq_len=longest, template=template)
    refuse_if_nothing_fits([task for suite in suites for task in suite.tasks], config.model.max_seq_len)
    return suites


def headline(suite: Suite, results: Sequence[Result], step: int) -> str:
    """One line about a suite."""
    rows = suite.summarize(results) or suite_rows(suite, results)
    found = ", ".join(f"{row['metric']} {with_error(row['value'], row['stderr'], 'no item scored')}" for row in rows)
    return f"{suite.name} after step {step:,}: {found}; {sum(result.seconds for result in results):.1f} s"
