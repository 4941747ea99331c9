"""Our model for EleutherAI's lm-evaluation-harness (extra `lm-eval`), without conversion.

The harness builds the prompts and judges; here only log-likelihoods and greedy text are computed, by the same `Scorer`
as our own tasks. Text that spells `<|endoftext|>` is text to our tokenizers.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from regpt.errors import UsageError, UserError, nearest
from regpt.evals.packing import Prompt
from regpt.evals.score import Progress, Scorer
from regpt.files import is_file, resolved
from regpt.sample.generate import generate
from regpt.sample.sampling import SamplingOptions
from regpt.text.tokenizer import Tokenizer

Request = tuple[Any, list[int], list[int]]  # the texts, tokens of the context, tokens of the continuation
BOOTSTRAPS = 1000  # resamples behind the standard error of a metric that is no mean
MAX_NEW_TOKENS = 256  # where a task does not say (the harness's own default)


class HarnessModel(TemplateLM):
    """The harness's interface over a scorer. Every process asks for everything and gets everything."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, progress: Progress | None = None):
        super().__init__()
        self.scorer, self.text, self.progress = scorer, tokenizer, progress
        self.max_length = scorer.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests of one context share it. Too long ones lose the beginning of their context, as in the harness."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, ending) in enumerate(requests):
            if len(ending):
                by_context.setdefault(tuple(context), []).append(number)
        prompts = [
            Prompt(
                np.array(context),
                [np.array(requests[k][2]) for k in numbers],
                [len(requests[k][2]) for k in numbers],
            )
            for context, numbers in by_context.items()
        ]
        scores = self.scorer(prompts, self.progress)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # what nothing has: probability 1
        order = [k for numbers in by_context.values() for k in numbers]
        for k, log_likelihood, greedy in zip(order, scores.log_likelihood.tolist(), scores.greedy.tolist()):
            found[k] = (log_likelihood, greedy)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length in which each token is predicted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.text.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        found = self._loglikelihood_tokens(windows)
        return np.bincount(owners, weights=[x for x, _ in found], minlength=len(requests)).tolist()

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The likeliest next token again and again, until a stop text, the end of the text, or the limit."""
        return [self.continuation(*request.args) for request in requests]

    def continuation(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature", 0):
            raise UserError("the task draws its texts (do_sample), which the adapter does not; choose another task")
        limit = min(int(options.get("max_gen_toks", MAX_NEW_TOKENS)), self.max_length - 1)
        tokens = (self.text.encode(context) or [self.text.eot])[-(self.max_length - limit) :]
        device = self.scorer.mesh.device
        with self.scorer.autocast():
            ids = generate(
                self.scorer.model,
                torch.tensor([tokens], device=device),
                limit,
                options=SamplingOptions(top_k=1),
                generator=torch.Generator(device).manual_seed(0),
                stop=self.text.eot,
            )
        new = ids[0, len(tokens) :].tolist()
        text = self.text.decode(new[: new.index(self.text.eot)] if self.text.eot in new else new)
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text


@dataclass(frozen=True)
class HarnessResult:
    """One task of the harness.

    Attributes:
        task: `lm-eval/` and its name there.
        metrics: metric → value, standard error where the harness gives one; a filter other than `none` is named.
        n: items.
        items: one row an item, `item` and its metrics.
    """

    task: str
    metrics: dict[str, tuple[float, float | None]]
    n: int
    items: list[dict[str, Any]]


def evaluate_harness(names: Sequence[str], model: HarnessModel, max_items: int = 0) -> list[HarnessResult]:
    """Run the harness on tasks by name (groups too), or from task files that end in `.yaml`.

    Raises:
        UsageError: a task that the harness does not know.
        UserError: a task's data cannot be had.
    """
    files = [resolved(name) for name in names if name.endswith((".yaml", ".yml"))]
    wanted: list[Any] = [task_of(name) for name in names]  # refused before the harness reads its thousands of tasks
    manager = TaskManager(include_path=[str(folder) for folder in dict.fromkeys(file.parent for file in files)] or None)
    for name in wanted:
        if name not in manager.all_tasks:
            close = nearest(name, manager.all_tasks)
            raise UsageError(f"lm-eval knows no task {name!r}{close}; lm-eval ls tasks lists them")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            found = simple_evaluate(
                model=model,
                tasks=wanted,
                limit=max_items or None,
                bootstrap_iters=BOOTSTRAPS,
                task_manager=manager,
            )
    except (ConnectionError, FileNotFoundError) as error:  # of the Hugging Face libraries, too
        raise UserError(f"lm-eval cannot load the data of {', '.join(names)} ({first_line(error)})") from None
    return [] if found is None else results_of(found)


def task_of(name: str) -> str:
    """The name that a task file gives its task, or the name itself."""
    if not name.endswith((".yaml", ".yml")):
        return name
    if not is_file(name):
        raise UsageError(f"the task file {name!r} does not exist; give an existing one, or the name of a task")
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    named = [line.removeprefix("task:").strip().strip("'\"") for line in lines if line.startswith("task:")]
    if not named:
        raise UsageError(f"the task file {name!r} names no task; it needs a line task: NAME")
    return named[0]


def results_of(found: Any) -> list[HarnessResult]:
    results = []
    for task, numbers in found["results"].items():
        metrics = {}
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = numbers.get(f"{metric}_stderr,{kind}")
                name = metric if kind == "none" else f"{metric}:{kind}"
                metrics[name] = (float(value), float(error) if isinstance(error, float | int) else None)
        samples = found.get("samples", {}).get(task, [])
        items = [{"item": one["doc_id"]} | scores_of(one, metrics) for one in samples]
        results.append(HarnessResult(f"lm-eval/{task}", metrics, len(samples), items))
    return results


def scores_of(sample: dict[str, Any], metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(sample[name]) for name in metrics if isinstance(sample.get(name), float | int)}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
