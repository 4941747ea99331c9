"""Our model for EleutherAI's lm-evaluation-harness (extra `lm-eval`), without conversion.

The harness builds the prompts and judges; here only log-likelihoods and greedy text are computed, by the same `Scorer`
as our own tasks. Text that spells `<|endoftext|>` is text to our tokenizers.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from regpt.engine.generate import encode_prompt, engine_for
from regpt.engine.noise import choice_seed
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request as Continuation
from regpt.engine.request import bad_logits
from regpt.errors import UsageError, UserError, first_line, nearest
from regpt.evals.packing import Prompt
from regpt.evals.score import Progress, Scorer
from regpt.evals.suite import TEXTS, HarnessChats, ShowProgress, Suite, refuse_base
from regpt.evals.task import Estimate, Result, Tolerate
from regpt.files import is_file, resolved
from regpt.text.chat import ChatTemplate
from regpt.text.tokenizer import Tokenizer

Request = tuple[Any, list[int], list[int]]  # the texts, tokens of the context, tokens of the continuation
Truncated = dict[str, set[str]]  # task → documents that are longer than the model
BOOTSTRAPS = 1000  # resamples for the standard error of a metric that is not a mean
MAX_NEW_TOKENS = 256  # where a task does not say (the harness's own default)
SEED = 1234  # of drawn texts: the harness's own
GREEDY = SamplingOptions(top_k=1)
# Arguments of generation that are followed, and the values with which others change nothing (Hugging Face's defaults).
HONOURED = (
    *("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
    *("do_sample", "temperature", "top_k", "top_p"),
)
AT_ONE = ("num_beams", "num_return_sequences", "repetition_penalty", "length_penalty", "typical_p", "use_cache")
AT_ZERO = ("no_repeat_ngram_size", "min_p", "presence_penalty", "frequency_penalty", "min_new_tokens", "early_stopping")
# What the code and the data of others' tasks raise while they are loaded: offline, missing packages, malformed files.
UNAVAILABLE = (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError)


class HarnessModel(TemplateLM):
    """The harness's interface over a scorer. Every process asks for everything and gets everything.

    Attributes:
        template: of chats, where they are asked for.
        rendered: text of a chat → its tokens, as in training and in use.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        progress: Progress | None = None,
        template: ChatTemplate | None = None,
    ):
        super().__init__()
        self.template, self.rendered = template, dict[str, list[int]]()
        self.scorer, self.text, self.progress = scorer, tokenizer, progress
        self.max_length = scorer.model.config.max_seq_len
        self.truncated: Truncated = {}
        self.asked: Sequence[Instance] = ()  # being scored; empty for rolling windows, which are not truncated

    @property
    def eot_token_id(self) -> int:
        return self.text.eot

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer and, by its hash, the template."""
        return f"{self.text.name}-{self.template.sha256[:8]}" if self.template else self.text.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.source if self.template and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat up to its answer, or with `add_generation_prompt` false into it, as far as the last
        message says.

        Raises:
            UserError: the model has no template, or it refuses the messages.
        """
        template = self.template or refuse_base()
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        ids = template.encode(messages) + (self.text.encode_continuations([begun])[0].tolist() if begun else [])
        text = template.render(template.apart(messages)) + begun
        self.rendered[text] = ids
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """An answer to a chat is encoded apart from the chat, as in training."""
        if context not in self.rendered:
            return super()._encode_pair(context, continuation)
        return self.rendered[context], self.text.encode_continuations([continuation])[0].tolist()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With what the tokenizer puts before every text, as in the harness's own backend; of a chat with its special
        tokens."""
        if string in self.rendered:
            return self.rendered[string]
        if add_special_tokens is False:
            return self.text.encode(string)
        return self.text.encode_prompts([string])[0].tolist()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in the harness; which items were cut is noted."""
        self.asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm)  # pyright: ignore[reportArgumentType]
        finally:
            self.asked = ()

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests of one context share it. Too long ones lose their beginning: of the context, as in the harness, and
        of an ending that is itself longer than the model, which the harness's own backend refuses."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for (_, context, ending), request in zip(requests, self.asked):
            self.note(request, len(context) + len(ending) - 1 > self.max_length or len(ending) > self.max_length)
        requests = [(texts, context, ending[-self.max_length :]) for texts, context, ending in requests]
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
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # an empty ending has probability 1
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

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or drawn text, until a stop text, the end of the text, or the limit. Each request of a call has a seed
        of its own, so repeated ones get different texts, and a second call the same ones."""
        asked = []
        for i, request in enumerate(requests):
            context, options = request.args  # pyright: ignore[reportAssignmentType]
            asked.append(self.asked_of(context, options, choice_seed(SEED, i), request))
        return self.continuations(asked)

    def continuation(self, context: str, options: dict[str, Any]) -> str:
        """The text after `context`; see `asked_of`."""
        return self.continuations([self.asked_of(context, options)])[0]

    def asked_of(
        self, context: str, options: dict[str, Any], seed: int = SEED, request: Instance | None = None
    ) -> Continuation:
        """What is asked of the engine for the text after `context`.

        Prompts are cut as by the harness's own backend: their end stays, and leaves room for the new tokens. A limit
        that leaves no room (`max_gen_toks` of the model's length or more, which that backend refuses) is lowered: the
        whole prompt stays where a new token fits after it, else its last half of the model's length. Both are counted.

        Raises:
            UserError: options that we cannot follow, by name.
        """
        asked = generation_of(options)
        prompt = self.rendered.get(context) or encode_prompt(self.text, context)
        ends = self.template.stop_ids if self.template else self.text.stop_ids
        tokens, limit = self.fitted(prompt, asked.limit)
        self.note(request, len(tokens) < len(prompt) or limit < asked.limit)
        until = [stop for stop in asked.until if stop]
        return Continuation(tokens, limit, asked.sampling, seed, stop_ids=ends, stop=until)

    def continuations(self, asked: Sequence[Continuation]) -> list[str]:
        """The texts, as the tokenizer decodes new tokens alone."""
        if not asked:
            return []
        texts, tokens = [""] * len(asked), [list[int]() for _ in asked]
        with self.scorer.autocast():
            engine = engine_for(self.scorer.model, asked, self.text)
            numbers = {engine.submit(one): i for i, one in enumerate(asked)}
            while engine.busy:
                for event in engine.step():
                    if event.finish_reason == "error":
                        raise bad_logits()
                    texts[numbers[event.request]] += event.text
                    tokens[numbers[event.request]] += [] if event.token is None else [event.token]
        return [text[1:] if spaced(text, self.text.decode(new)) else text for text, new in zip(texts, tokens)]

    def fitted(self, prompt: list[int], limit: int) -> tuple[list[int], int]:
        """The tokens of the prompt that stay, and the new ones that fit after them; see `asked_of`."""
        longest = self.max_length
        if limit < longest:
            return prompt[-(longest - limit) :], limit
        kept = prompt if len(prompt) < longest else prompt[-max(1, longest // 2) :]
        return kept, longest - len(kept)

    def note(self, request: Instance | None, truncated: bool) -> None:
        """Count the item of a request that is longer than the model."""
        if truncated and request is not None:
            self.truncated.setdefault(str(request.task_name), set()).add(str(request.doc_id))


def spaced(text: str, decoded: str) -> bool:
    """Whether a text begins with the space that Llama 2's tokenizer puts before every text and takes away again."""
    return text.startswith(" ") and not decoded.startswith(" ")


class Generation(NamedTuple):
    """Options of a task for generated text."""

    sampling: SamplingOptions
    limit: int
    until: list[str]


def generation_of(options: dict[str, Any]) -> Generation:
    """A task's generation arguments, by the harness's own rules: other names of `max_gen_toks`, a temperature without
    `do_sample` draws, `do_sample: false` is greedy whatever the temperature.

    Raises:
        UserError: an argument that the adapter does not follow, or a value that is not allowed.
    """
    given = {key: value for key, value in options.items() if value is not None}
    neutral = {**dict.fromkeys(map(str, AT_ONE), 1), **dict.fromkeys(map(str, AT_ZERO), 0)}
    unknown = [key for key in given if key not in HONOURED and given[key] != neutral.get(key, object())]
    if unknown:
        raise UserError(
            f"the task asks for {', '.join(f'{key} = {given[key]!r}' for key in unknown)}, which the adapter does not "
            f"follow; it follows {', '.join(HONOURED)}"
        )
    try:
        asked: dict[str, Any] = dict(
            normalize_gen_kwargs({key: given[key] for key in given if key in HONOURED}, MAX_NEW_TOKENS)
        )
        until, limit = asked["until"], asked["max_gen_toks"]
        temperature, top_p = float(asked.get("temperature", 0.0)), float(given.get("top_p", 1.0))
        top_k = int(given.get("top_k", 0))
    except (TypeError, ValueError) as error:
        raise UserError(f"the task's generation arguments {given!r} are not of the right kind ({error})") from None
    if limit < 1 or not all(isinstance(stop, str) for stop in until):
        raise UserError(f"the task's max_gen_toks is {limit} and until {until!r}; they must be 1 or more, and texts")
    if not asked["do_sample"]:
        return Generation(GREEDY, limit, until)
    if "temperature" not in given:
        temperature = 1.0
    try:
        return Generation(SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p), limit, until)
    except UsageError as error:
        raise UserError(f"the task draws its texts, but {error}") from None


class HarnessSuite(Suite):
    """A suite of tasks of the harness, by name (groups too) or from task files that end in `.yaml`.

    Each is run on its own: an error in one does not touch the others.
    """

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, tolerate: Tolerate, chats: HarnessChats = TEXTS):
        """
        Raises:
            UsageError: a task that the harness does not know.
            UserError: chats are asked for, and there is no template.
        """
        super().__init__("lm-eval", ())
        self.chats = chats
        if chats.apply_chat_template and chats.template is None:
            refuse_base()
        self.tokenizer, self.tolerate = tokenizer, tolerate
        files = [resolved(name) for name in names if name.endswith((".yaml", ".yml"))]
        self.wanted = [task_of(name) for name in names]  # refused before the harness reads its thousands of tasks
        folders = list(dict.fromkeys(str(file.parent) for file in files))
        self.manager = TaskManager(include_path=[*folders] or None)
        for name in self.wanted:
            if name not in self.manager.all_tasks:
                close = nearest(name, self.manager.all_tasks)
                raise UsageError(f"lm-eval knows no task {name!r}{close}; lm-eval ls tasks lists them")

    def evaluate(self, scorer: Scorer, show: ShowProgress, max_items: int) -> list[Result]:
        """Run every task on `max_items` items (0: all)."""
        results: list[Result] = []
        with show(self.name) as progress:
            template = self.chats.template if self.chats.apply_chat_template else None
            model = HarnessModel(scorer, self.tokenizer, progress, template)
            for name in self.wanted:
                started = time.perf_counter()
                try:
                    found = evaluate_harness(name, model, self.manager, max_items, self.chats)
                except UserError as error:
                    self.tolerate(f"lm-eval/{name}", error)
                    continue
                share = (time.perf_counter() - started) / max(1, len(found))
                results += [replace(one, seconds=share) for one in found]
        return results


def evaluate_harness(
    name: str, model: HarnessModel, manager: TaskManager, max_items: int = 0, chats: HarnessChats = TEXTS
) -> list[Result]:
    """Run one task or group.

    Raises:
        UserError: its data are unavailable, or it asks for an option that the adapter does not support.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            loaded: dict[str, Any] = dict(manager.load([name]))  # runs the task's own code on its data
    except UNAVAILABLE as error:
        raise UserError(f"lm-eval cannot load {name!r} ({first_line(error)})") from None
    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=model,
            tasks=[loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()],
            limit=max_items or None,
            bootstrap_iters=BOOTSTRAPS,
            task_manager=manager,
            apply_chat_template=chats.apply_chat_template,
            fewshot_as_multiturn=chats.fewshot_as_multiturn,
            system_instruction=chats.system_instruction or None,
        )
    return [] if found is None else results_of(found, model.truncated)


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


def results_of(found: Any, truncated: Truncated) -> list[Result]:
    results = []
    for task, numbers in found["results"].items():
        metrics: dict[str, Estimate] = {}
        samples = found.get("samples", {}).get(task, [])
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = numbers.get(f"{metric}_stderr,{kind}")
                stderr = float(error) if isinstance(error, float | int) else None
                metrics[metric if kind == "none" else f"{metric}:{kind}"] = Estimate(float(value), stderr, len(samples))
        columns = {name: [one.get(name) for one in samples] for name in metrics}
        outcomes = {
            name: np.array(values, dtype=np.float64)
            for name, values in columns.items()
            if all(isinstance(value, float | int) for value in values)
        }
        results.append(
            Result(
                f"lm-eval/{task}",
                outcomes,
                np.array([one["doc_id"] for one in samples]),
                len(samples),
                cut=len(truncated.get(task, ())),
                metrics=metrics,
            )
        )
    return results
