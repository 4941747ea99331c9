"""One way from MODEL and tasks to numbers, for `regpt eval` and the API; on one process or several."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from regpt.checkpoint.open import OpenModel, may_be_model, open_model
from regpt.config import RunConfig, read_config
from regpt.data.batch import Batch
from regpt.data.info import tokenizer_identity
from regpt.data.manifest import read_manifest
from regpt.errors import UsageError, UserError
from regpt.evals.perplexity import Validation
from regpt.evals.score import Progress, Scorer
from regpt.evals.specs import Spec
from regpt.evals.suite import HarnessChats, Row, ShowProgress, Suite, open_suites, suite_rows
from regpt.evals.task import refuse_if_nothing_fits
from regpt.files import exists, is_file, resolved
from regpt.parallel.mesh import Mesh
from regpt.runs.answers import AnswerOptions, open_answers
from regpt.runs.remote import on_this_machine
from regpt.runs.validation import Validated, ValidationPart, folder_parts, own_sums, part_batches, result
from regpt.text.certificate import refuse_other_template
from regpt.text.chat import PLAIN, ChatTemplate
from regpt.text.folder import CHAT
from regpt.train.backend import make_loss_sum
from regpt.train.config import EvalPrecision
from regpt.train.precision import autocast, check_precision, hold, inference_dtype, set_matmul_precision


@dataclass(frozen=True)
class EvalRequest(AnswerOptions):
    """Model, tasks and limits of an evaluation; of the task `conversations` what `AnswerOptions` has.

    Attributes:
        model: MODEL as typed.
        specs: the tasks.
        data: folder of token shards for `val`; None is the run's own.
        val_tokens, seq_len, batch_rows: rows that `val` reads, and how many at once.
        precision: number format of the computation.
        compile: compile the scoring of tasks.
        max_items: of each task, 0 for all.
        ema: with the moving average of the weights.
        apply_chat_template, fewshot_as_multiturn, system_instruction: of `lm-eval`, see `HarnessChats`.
    """

    model: str
    specs: Sequence[Spec]
    data: str | None = None
    val_tokens: int = 0
    seq_len: int | None = None
    batch_rows: int = 8
    precision: EvalPrecision = "fp32"
    compile: bool = False
    max_items: int = 0
    ema: bool = False
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str = ""

    def __post_init__(self) -> None:
        for name in ("max_items", "val_tokens"):
            if (value := getattr(self, name)) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, must be 0 (no limit) or more")
        kinds = {spec.kind for spec in self.specs}
        if kinds == {"val"} and (useless := self.given("max_items")):
            raise UsageError(
                f"{useless} would change nothing with --tasks val, which has no items; name another task too (--tasks "
                "val,hellaswag), or leave it out"
            )
        if not 0 < self.val_fraction <= 1:
            raise UsageError(f"--val-fraction is {self.val_fraction:g}, must be above 0 and at most 1")
        retrieval = () if self.retrieve else ("passages", "with_answers")
        for task, names in {
            "val": ("data", "val_tokens", "batch_rows", *(() if "conversations" in kinds else ("seq_len",))),
            "conversations": ("few_shot", "seed", "retrieve", "passages", "with_answers", "val_fraction"),
            "lm-eval": ("apply_chat_template", "fewshot_as_multiturn", "system_instruction"),
        }.items():
            if task not in kinds and (useless := self.given(*names)):
                raise UsageError(
                    f"{useless} would change nothing without the task {task}; name it too (--tasks {task},…), or leave "
                    "it out"
                )
        for need, names in (("retrieve FOLDER", retrieval), ("few-shot K", () if self.few_shot else ("seed",))):
            if useless := self.given(*names):
                raise UsageError(f"{useless} would change nothing without --{need}; add it, or leave it out")

    def given(self, *names: str) -> str:
        """Those of the options that are not as by default, as flags."""
        defaults = {field.name: field.default for field in fields(self)}
        return " and ".join(f"--{n.replace('_', '-')}" for n in names if getattr(self, n) != defaults[n])


@dataclass(frozen=True)
class ValTask:
    """The rows of the split `val` of `folder` that are read."""

    folder: Path
    seq_len: int
    split_tokens: int
    parts: list[ValidationPart]

    @property
    def n_rows(self) -> int:
        return sum(part.n_rows for part in self.parts)


@dataclass(frozen=True)
class ModelEvaluation:
    """The numbers of a model.

    Attributes:
        val: where it was asked for.
        suites: each suite's results: `Suite` and `Result`, or `HarnessSuite` and `HarnessResult` of lm-eval.
        failures: a sentence for each task that could not be evaluated.
    """

    opened: OpenModel
    val: tuple[ValTask, Validated] | None
    suites: list[tuple[Any, list[Any]]]
    compile_seconds: float
    failures: list[str]


def evaluate_model(asked: EvalRequest, mesh: Mesh, show: ShowProgress) -> ModelEvaluation:
    """Open the model and evaluate it; every process of `mesh` gets all numbers.

    Raises:
        UsageError: a model, folder, length or name of a task that does not fit.
        UserError: data of another tokenizer, damaged weights, too little memory, or no task that can be evaluated.
    """
    check_precision(asked.precision, mesh.device)
    model = on_this_machine(asked.model, mesh)
    run = run_config(model)
    folder = data_folder(asked, run) if any(spec.kind == "val" for spec in asked.specs) else None
    with mesh.pulse.working("opening the model"):
        opened = open_model(model, mesh.device, ema=asked.ema, narrow=asked.precision == "bf16")
    set_matmul_precision(asked.precision)
    hold(opened.model.eval(), asked.precision, inference_dtype(asked.precision, opened.model.dtype))
    task = open_val(asked, run, folder, opened) if folder else None
    failures: list[tuple[str, UserError]] = []

    def tolerate(task: str, error: UserError) -> None:
        failures.append((task, error))

    longest = opened.model.config.max_seq_len
    template = chat_template(asked, opened)
    answers = answer_opener(asked, run, opened, template)
    chats = HarnessChats(asked.apply_chat_template, asked.fewshot_as_multiturn, asked.system_instruction)
    given = (asked.specs, opened.tokenizer, None, tolerate, longest, template, chats, answers)
    suites: list[Any] = list(open_suites(*given))
    if not task and all(suite.tasks for suite in suites):  # those of lm-eval are not open yet
        if failures and not suites:
            raise failures[0][1]
        refuse_if_nothing_fits([one for suite in suites for one in suite.tasks], longest)
    val = (task, validate(asked, task, opened, mesh, show)) if task else None
    scorer = Scorer(opened.model, mesh, autocast=lambda: autocast(asked.precision, mesh.device), compile=asked.compile)
    found = [(suite, suite.evaluate(scorer, show, asked.max_items)) for suite in suites]
    if failures and not val and not any(results for _, results in found):
        raise failures[0][1]
    sentences = [f"{name} was not evaluated: {error}" for name, error in failures]
    return ModelEvaluation(opened, val, found, scorer.cost.compile_seconds, sentences)


def chat_template(asked: EvalRequest, opened: OpenModel) -> ChatTemplate | None:
    """The model's template, where chat tasks are asked for; one that its certificate does not name is refused."""
    source = opened.companions.get(CHAT, "")
    kinds = ("chat", "conversations", *(["lm-eval"] if asked.apply_chat_template else []))
    if not source or all(spec.kind not in kinds for spec in asked.specs):
        return None
    refuse_other_template(source, opened.companions)
    return ChatTemplate(source, opened.tokenizer)


def answer_opener(
    asked: EvalRequest, run: RunConfig | None, opened: OpenModel, template: ChatTemplate | None
) -> Callable[[Spec], Suite]:
    """What opens the task `conversations`: with the model's template, of a base model the plain one."""
    length = sequence_length(asked, run, opened)
    given = template or ChatTemplate(PLAIN, opened.tokenizer)
    return lambda spec: open_answers(str(spec), spec.argument, given, length, asked)


def sequence_length(asked: EvalRequest, run: RunConfig | None, opened: OpenModel) -> int:
    """--seq-len, or the run's, or the model's."""
    longest = opened.model.config.max_seq_len
    seq_len = asked.seq_len if asked.seq_len is not None else run.data.seq_len if run else longest
    if not 1 <= seq_len <= longest:
        raise UsageError(f"seq-len is {seq_len}, must be between 1 and the model's {longest}")
    return seq_len


def run_config(model: str) -> RunConfig | None:
    """Configuration of the run that `model` names, or whose checkpoint it names; None for another model."""
    folder = resolved(model)
    if folder.parent.name == "checkpoints":
        folder = folder.parents[1]
    return read_config(str(folder / "config.toml")) if is_file(folder / "config.toml") else None


def data_folder(asked: EvalRequest, run: RunConfig | None) -> Path:
    """--data, or the run's own data."""
    if asked.data is not None:
        return Path(asked.data)
    if run is not None and run.data.mixture:
        raise UsageError(
            f"{asked.model!r} was trained on several folders; choose one of them with --data DIR: "
            f"{', '.join(run.data.mixture)}"
        )
    if run is None or not run.data.path:
        if exists(asked.model) or not may_be_model(asked.model):
            open_model(asked.model)  # raises the right error where it is none
        raise UsageError(
            f"{asked.model!r} names no run that knows its data; give the folder of token shards with --data DIR"
        )
    return Path(run.data.path)


def open_val(asked: EvalRequest, run: RunConfig | None, folder: Path, opened: OpenModel) -> ValTask:
    """The validation rows.

    Raises:
        UserError: a data folder that is broken, made with another tokenizer, or too small.
        UsageError: a sequence length that the model does not have.
    """
    manifest = read_manifest(folder)
    if tokenizer_identity(folder, manifest) != opened.tokenizer.sha256:
        raise UserError(
            f"data folder {str(folder)!r} was made with the tokenizer {manifest.tokenizer!r} "
            f"({manifest.tokenizer_sha256[:12]}…), the model has {opened.tokenizer.name!r} "
            f"({opened.tokenizer.sha256[:12]}…); prepare the text again with the model's tokenizer"
        )
    seq_len = sequence_length(asked, run, opened)
    if asked.batch_rows < 1:
        raise UsageError(f"batch-rows is {asked.batch_rows}, must be at least 1")
    parts = folder_parts(folder, manifest, seq_len, asked.val_tokens)
    return ValTask(folder, seq_len, manifest.tokens("val"), parts)


def validate(asked: EvalRequest, task: ValTask, opened: OpenModel, mesh: Mesh, show: ShowProgress) -> Validated:
    """Read the rows and sum their losses."""
    loss_sum = make_loss_sum(opened.model, asked.precision, mesh.device, compile=False)
    done = 0

    def batches(part: ValidationPart) -> Iterator[Batch]:
        nonlocal done
        read = 0
        for batch in part_batches(part, mesh, asked.batch_rows):
            yield batch
            new = min(part.n_rows, read + asked.batch_rows * mesh.world_size) - read
            read, done = read + new, done + new
            progress(done, task.n_rows)

    try:
        with show("val") as progress:
            sums = own_sums(task.parts, batches, loss_sum, opened.tokenizer.byte_lengths(), mesh.device)
    except (RuntimeError, MemoryError) as error:  # CUDA's, PyTorch's on the CPU, Python's
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        advice = f"--batch-rows {asked.batch_rows // 2}" if asked.batch_rows > 1 else "a shorter --seq-len"
        raise UserError(f"out of memory with --batch-rows {asked.batch_rows}; try {advice}") from error
    found = result(task.parts, mesh.total(sums))
    if not math.isfinite(found.whole.loss):
        raise UserError(
            f"the loss is {found.whole.loss}: the weights of {asked.model!r} are damaged; use an earlier checkpoint"
        )
    return found


def report(asked: EvalRequest, found: ModelEvaluation) -> dict[str, Any]:
    """The numbers as JSON."""
    tasks: dict[str, Any] = {}
    if found.val:
        task, val = found.val
        sources = {name: val_numbers(one) for name, one in val.sources.items()}
        where = {"seq_len": task.seq_len, "data": str(task.folder)}
        tasks["val"] = val_numbers(val.whole) | ({"sources": sources} if sources else {}) | where
    for suite, results in found.suites:
        read = {"read_seconds": suite.seconds} if suite.tasks else {}
        tasks |= {one.task: one.report() | read for one in results}
        for one in results:
            for metric, numbers in tasks[one.task]["metrics"].items():
                numbers |= suite.more(one, metric)
        tasks |= {row["task"]: {key: x for key, x in row.items() if key != "task"} for row in suite.summarize(results)}
    return {
        "model": asked.model,
        "source": found.opened.source,
        "step": found.opened.step,
        "precision": asked.precision,
        "compiled": asked.compile,
        "compile_seconds": found.compile_seconds,
        "tasks": tasks,
        "failures": found.failures,
    }


def val_numbers(val: Validation) -> dict[str, Any]:
    perplexity = val.perplexity if math.isfinite(val.perplexity) else None  # JSON has no infinity
    return {**val._asdict(), "perplexity": perplexity}


def rows(found: ModelEvaluation) -> list[Row]:
    """The numbers as rows of metrics.jsonl of kind `eval`: one a task and metric."""
    table = []
    if found.val:
        for name, val in {"val": found.val[1].whole, **found.val[1].sources}.items():
            task = name if name == "val" else f"val:{name}"
            values = (("loss", val.stderr), ("bpb", val.bpb_stderr), ("perplexity", None))
            table += [
                {"task": task, "metric": key, "value": getattr(val, key), "stderr": error, "n": val.tokens}
                for key, error in values
            ]
    return [*table, *(row for suite, results in found.suites for row in suite_rows(suite, results))]


@contextlib.contextmanager
def silent(name: str) -> Iterator[Progress]:
    """Show no progress."""
    yield lambda done, total: None
