"""`regpt eval`: the numbers of a model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.parse import parse
from regpt.errors import UsageError, UserError, nearest
from regpt.train.config import PrecisionName

if TYPE_CHECKING:
    import torch

    from regpt.checkpoint.open import OpenModel
    from regpt.config import RunConfig
    from regpt.data.batch import Batch
    from regpt.data.stream import ShardStream
    from regpt.evals.perplexity import Validation

TASKS = ("val",)


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a model. Task val: loss, bits per byte and perplexity on the held-out split of a data folder."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint folder, a Hugging Face folder, or a hub name such as gpt2."""
    tasks: str = "val"
    """Names with commas between them; there is: val."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of token shards; default: the one that the run was trained on."""
    val_tokens: int = 0
    """Tokens evaluated, from the start of the split, in full rows; 0 for all."""
    seq_len: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Tokens a row; default: the run's data.seq_len, or the model's length."""
    batch_rows: int = 4
    """Rows computed at once; the result does not depend on it."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results to this file; - prints them as JSON instead."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: PrecisionName = "fp32"
    """Number format of the computation."""


@dataclass(frozen=True)
class ValTask:
    """What is read: the first `n_rows` rows of `seq_len` tokens of the split `val` of `folder`."""

    folder: Path
    stream: ShardStream
    seq_len: int
    n_rows: int


def main(args: list[str]) -> int:
    """Parse, open the model, evaluate, print."""
    given = parse(EvalArgs, args, prog="regpt eval")
    check_tasks(given.tasks)
    from regpt.checkpoint.open import open_model
    from regpt.parallel.mesh import choose_device

    device = choose_device(given.device)
    run = run_config(given.model)
    folder = data_folder(given, run)
    opened = open_model(given.model, device)
    task = open_task(given, run, folder, opened)
    result = evaluate(given, task, opened, device)
    if not math.isfinite(result.loss):
        raise UserError(
            f"the loss is {result.loss}: the weights of {given.model!r} are damaged; use an earlier checkpoint"
        )
    report = {
        "model": given.model,
        "source": opened.source,
        "step": opened.step,
        "precision": given.precision,
        "tasks": {"val": {**val_numbers(result), "seq_len": task.seq_len, "data": str(folder)}},
    }
    if given.json == "-":
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print_result(result, task)
    if given.json is not None:
        write_report(Path(given.json), report)
    return 0


def check_tasks(tasks: str) -> None:
    """Raise a UsageError for the first task that does not exist."""
    for name in tasks.split(","):
        if name.strip() not in TASKS:
            raise UsageError(f"task {name.strip()!r} is unknown{nearest(name, TASKS)}; choose from {', '.join(TASKS)}")


def run_config(model: str) -> RunConfig | None:
    """Configuration of the run that `model` names, or whose checkpoint it names; None for another model."""
    from regpt.config import read_config

    folder = Path(model).resolve()
    if folder.parent.name == "checkpoints":
        folder = folder.parents[1]
    return read_config(str(folder / "config.toml")) if (folder / "config.toml").is_file() else None


def data_folder(given: EvalArgs, run: RunConfig | None) -> Path:
    """--data, or the run's own data."""
    if given.data is not None:
        return Path(given.data)
    if run is not None and run.data.mixture:
        raise UsageError(
            f"{given.model!r} was trained on several folders; choose one of them with --data DIR: "
            f"{', '.join(run.data.mixture)}"
        )
    if run is None or not run.data.path:
        raise UsageError(
            f"{given.model!r} names no run that knows its data; give the folder of token shards with --data DIR"
        )
    return Path(run.data.path)


def open_task(given: EvalArgs, run: RunConfig | None, folder: Path, opened: OpenModel) -> ValTask:
    """The validation rows.

    Raises:
        UserError: a data folder that is broken, made with another tokenizer, or too small.
        UsageError: a sequence length that the model does not have.
    """
    from regpt.data.manifest import read_manifest
    from regpt.data.stream import open_stream
    from regpt.evals.perplexity import count_rows

    manifest = read_manifest(folder)
    if manifest.tokenizer_sha256 != opened.tokenizer.sha256:
        raise UserError(
            f"data folder {str(folder)!r} was made with the tokenizer {manifest.tokenizer!r} "
            f"({manifest.tokenizer_sha256[:12]}…), the model has {opened.tokenizer.name!r} "
            f"({opened.tokenizer.sha256[:12]}…); prepare the text again with the model's tokenizer"
        )
    longest = opened.model.config.max_seq_len
    seq_len = given.seq_len if given.seq_len is not None else run.data.seq_len if run else longest
    if not 1 <= seq_len <= longest:
        raise UsageError(f"seq-len is {seq_len}, must be between 1 and the model's {longest}")
    stream = open_stream(folder, manifest, "val", "sequential", seed=0)
    return ValTask(folder, stream, seq_len, count_rows(stream.epoch_tokens, seq_len, given.val_tokens))


def evaluate(given: EvalArgs, task: ValTask, opened: OpenModel, device: torch.device) -> Validation:
    """Read the rows and sum their losses."""
    from regpt.evals.perplexity import validate
    from regpt.train.loss import make_loss_sum
    from regpt.train.precision import parameter_dtype, set_matmul_precision

    set_matmul_precision(given.precision)
    model = opened.model.to(parameter_dtype(given.precision)).eval()
    loss_sum = make_loss_sum(model, given.precision, device, compile=False)
    try:
        return validate(loss_sum, val_batches(task, given.batch_rows), opened.tokenizer.byte_lengths(), device)
    except (RuntimeError, MemoryError) as error:  # CUDA's, PyTorch's on the CPU, Python's
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        advice = f"--batch-rows {given.batch_rows // 2}" if given.batch_rows > 1 else "a shorter --seq-len"
        raise UserError(f"out of memory with --batch-rows {given.batch_rows}; try {advice}") from error


def val_batches(task: ValTask, batch_rows: int) -> Iterator[Batch]:
    """The rows in order, with a progress bar on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from regpt.data.loader import row_batch
    from regpt.data.rows import StreamRows
    from regpt.evals.perplexity import split_rows

    console = Console(stderr=True)
    columns = ("val", BarColumn(), "{task.completed:,} of {task.total:,} tokens", TextColumn("{task.fields[rate]}"))
    silent = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=silent) as progress:
        bar = progress.add_task("val", total=task.n_rows * task.seq_len, rate="")
        for rows in split_rows(task.n_rows, batch_rows):
            yield row_batch(StreamRows(task.stream, task.seq_len), rows.start, len(rows))
            speed = progress.tasks[0].speed
            progress.update(bar, advance=len(rows) * task.seq_len, rate=f"{speed:,.0f} tokens/s" if speed else "")


def val_numbers(result: Validation) -> dict[str, float | None]:
    perplexity = result.perplexity if math.isfinite(result.perplexity) else None  # JSON has no infinity
    return {**result._asdict(), "perplexity": perplexity}


def print_result(result: Validation, task: ValTask) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "loss", "bits per byte", "perplexity", "tokens")
    bpb = "-" if result.bpb is None else f"{result.bpb:.4f}"
    table.add_row("val", f"{result.loss:.4f}", bpb, f"{result.perplexity:.2f}", f"{result.tokens:,}")
    console = Console(file=sys.stdout)
    console.print(table)
    split = f"{task.stream.epoch_tokens:,} tokens of split val of {str(task.folder)!r}"
    console.print(f"{task.n_rows:,} rows of {task.seq_len:,} tokens, of {split}", highlight=False, soft_wrap=True)


def write_report(path: Path, report: dict[str, object]) -> None:
    """`report` as JSON, under its name only when it is whole."""
    from regpt.checkpoint.files import write_json

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_json(temporary, report)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); choose another place for --json") from None
