"""`regpt eval`: evaluate a model on held-out text and on tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.parse import OTHER_JSON, check_json, parse
from regpt.console.lines import print_json, print_line, print_note, print_rows
from regpt.console.text import counted
from regpt.errors import UsageError, UserError
from regpt.evals.specs import Spec, parse_tasks
from regpt.files import is_file, write_json, write_text
from regpt.ranges import MANY, PROCESSES, Range
from regpt.train.config import EvalPrecision

if TYPE_CHECKING:
    from regpt.evals.score import Progress
    from regpt.runs.evaluate import EvalRequest, ModelEvaluation


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a model: loss and bits per byte on held-out text, HellaSwag, CORE, multiple choice, replies to generated
    questions, lm-eval's tasks."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name such
    as gpt2."""
    tasks: str = "val"
    """Comma-separated names: val; hellaswag, or hellaswag:FILE; core:DIR, or core:DIR/TASK,TASK; mc:FILE; needle, or
    needle:lengths=1024/4096:depths=0/50/100:text=FILE; chat:TASK, or chat:TASK:difficulty=2:items=200:seed=0:tokens=64;
    lm-eval:TASK,TASK…"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """val: folder of token shards; default: that of the run's training data."""
    val_tokens: Annotated[int, Range(0, MANY)] = 0
    """val: tokens evaluated, from the start of the split, in full rows; 0 for all."""
    seq_len: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, MANY)] = None
    """val: tokens per row; conversations: of one at most; default: the run's data.seq_len, or the model's
    max_seq_len."""
    batch_rows: Annotated[int, Range(1, MANY)] = 8
    """val: rows per batch; it does not change the loss, but the standard error is computed over batches."""
    max_items: Annotated[int, Range(0, MANY)] = 0
    """Items per task other than val, the first of a fixed order; 0 for all."""
    val_fraction: Annotated[float, Range(0, 1, above=True)] = 0.05
    """conversations: the part whose answers are predicted, that which finetune with this flag holds out; 1 for all."""
    few_shot: Annotated[int, Range(0, 1000)] = 0
    """conversations: so many examples of the other part before each question, drawn anew for each."""
    seed: int = 0
    """conversations: of these draws."""
    retrieve: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """conversations: before each question the passages of these documents (whatever regpt data prepare reads) that BM25
    finds for it."""
    passages: Annotated[int, Range(1, 100)] = 3
    """conversations: how many."""
    with_answers: bool = False
    """conversations: also passages of held-out conversations and such as hold the answer, which are passed over."""
    apply_chat_template: tyro.conf.FlagCreatePairsOff[bool] = False
    """lm-eval: ask as a chat, by the model's template; the answer is written or scored in its place."""
    fewshot_as_multiturn: bool = True
    """lm-eval: examples of a chat as turns of it; otherwise all in one message."""
    system_instruction: str = ""
    """lm-eval: the system message of a chat; without one the text before everything."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best")] = ""
    """Checkpoint of a run: this step, or best for the lowest validation loss; default: the newest."""
    ema: bool = False
    """Evaluate the moving average of the weights, which train.ema_decay keeps."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results to this file; - prints them as JSON instead."""
    items: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Also write the result of every item, TASK-step-N.jsonl, into this folder; regpt diff reads RUN/evals."""
    write_train: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Evaluate nothing: write training items of the chat tasks, none of which is in the test, as JSON lines for regpt
    finetune --data; --max-items says how many of each."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: EvalPrecision = "fp32"
    """Number format of the computation; bf16 is fastest on GPUs. int8: weights in 8.5 bits, products in fp32 on a
    CPU and in bf16 on CUDA."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the scoring of tasks with torch.compile; auto: on CUDA devices."""
    nproc: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, PROCESSES)] = None
    """Start this many processes on this machine (torchrun) that share the work: one per GPU, or several on the CPU."""


def main(args: list[str]) -> int:
    """Parse, evaluate, print."""
    given = parse(EvalArgs, args, prog="regpt eval")
    specs = parse_tasks(given.tasks)
    if given.write_train is not None:
        return write_training_items(given, specs)
    if not given.model:
        raise UsageError("no model was given; regpt eval MODEL --tasks …, with a run, a checkpoint or a name as gpt2")
    refuse_useless(given, {spec.kind for spec in specs})
    check_json(given.json)
    from regpt.checkpoint.best import at_step
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import open_mesh, under_launcher

    if given.nproc and not under_launcher():
        return launch(given.nproc, ["eval", *args])
    from regpt.runs.evaluate import EvalRequest, evaluate_model, report, silent

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork processes for standard errors
    with open_mesh(given.device) as mesh:
        shared = {one.name for one in fields(EvalRequest)} - {"model", "specs", "compile"}
        asked = EvalRequest(
            model=at_step(given.model, given.step),
            specs=specs,
            compile=mesh.device.type == "cuda" if given.compile == "auto" else given.compile == "on",
            **{name: getattr(given, name) for name in shared},
        )
        found = evaluate_model(asked, mesh, bar if mesh.is_main else silent)
        if not mesh.is_main:
            return 0
    if given.items is not None:
        write_all_items(Path(given.items), found)
    if given.json == "-":
        print_json(report(asked, found))
    else:
        try:
            if given.json is not None:
                write_json(Path(given.json), report(asked, found), OTHER_JSON)
        finally:  # a disk that is full by now loses the file, not the numbers
            show(asked, found)
    for sentence in found.failures:
        print_note(sentence)
    return 1 if found.failures else 0


def write_training_items(given: EvalArgs, specs: list[Spec]) -> int:
    """Write items of the split `train`, one task after another."""
    from regpt.evals.chat.tasks import chat_options, make_items

    assert given.write_train is not None
    if others := [str(spec) for spec in specs if spec.kind != "chat"]:
        raise UsageError(f"--write-train writes items of chat tasks, {others[0]} has none; give --tasks chat:TASK")
    if given.model:
        raise UsageError(f"--write-train reads no model; leave out {given.model!r}, or --write-train FILE")
    if is_file(given.write_train):
        raise UserError(f"{given.write_train!r} exists already; choose another file for --write-train, or delete it")
    options = [chat_options(spec.argument) for spec in specs]
    asked = [one._replace(items=given.max_items or one.items) for one in options]
    found = [make_items(one, "train") for one in asked]
    try:
        write_text(Path(given.write_train), "".join(item.line() for items in found for item in items))
    except OSError as error:
        raise UserError(f"cannot write {given.write_train!r} ({error.strerror}); choose another file") from None
    for spec, one, items in zip(specs, asked, found):
        fewer = "" if len(items) == one.items else f" of {one.items:,}: there are no more at this difficulty"
        print_line(f"{spec}: {counted(len(items), 'item')}{fewer}")
    print_line(given.write_train)
    return 0


def refuse_useless(given: EvalArgs, kinds: set[str]) -> None:
    """Raise a UsageError for --items of tasks that have none; `EvalRequest` refuses the rest."""
    if kinds == {"val"} and given.items:
        raise UsageError(
            "--items would change nothing with --tasks val, which has no items; name another task too (--tasks "
            "val,hellaswag), or leave it out"
        )


@contextlib.contextmanager
def bar(name: str) -> Iterator[Progress]:
    """A progress bar with the time left, on the terminal's error stream; nothing elsewhere."""
    from regpt.console.drawing import progress_bar

    with progress_bar(transient=True) as progress:
        task = progress.add_task(name, total=None)  # the total is known after the first batch

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"{name} {done:,} of {total:,}")

        yield update


def show(asked: EvalRequest, found: ModelEvaluation) -> None:
    """Print the tables of validation and of the other tasks."""
    if found.val:
        show_val(found)
    if any(results for _, results in found.suites):
        show_tasks(asked, found)


def show_val(found: ModelEvaluation) -> None:
    from regpt.evals.task import with_error

    assert found.val
    task, val = found.val
    rows = []
    for name, one in {"val": val.whole, **val.sources}.items():
        loss, bpb = with_error(one.loss, one.stderr), with_error(one.bpb, one.bpb_stderr)
        rows.append((name, loss, bpb, f"{one.perplexity:.2f}", f"{one.tokens:,}"))
    print_rows(("task", "loss", "bits per byte", "perplexity", "tokens"), rows)
    split = f"{task.split_tokens:,} tokens of split val of {str(task.folder)!r}"
    print_line(f"{counted(task.n_rows, 'row')} of {counted(task.seq_len, 'token')}, of {split}")


def show_tasks(asked: EvalRequest, found: ModelEvaluation) -> None:
    from regpt.evals.task import with_error

    rows = []
    for suite, results in found.suites:
        for one in results:
            seconds = f"{one.seconds + suite.seconds / len(results):.1f}"
            for metric, value in one.estimates().items():
                items = f"{value.n:,}" if value.n == one.n_items else f"{value.n:,} of {one.n_items:,}"
                items += f", {one.left_out:,} left out" if one.left_out else ""
                rows.append((one.task, metric, value.text(), items, seconds))
        for row in suite.summarize(results):
            rows.append((row["task"], row["metric"], with_error(row["value"], row["stderr"]), "", ""))
    print_rows(("task", "metric", "value", "items", "seconds"), rows, left=(0, 1))
    show_cells(found)
    longest = found.opened.model.config.max_seq_len
    for sentence in (one for suite, results in found.suites for one in suite.notices(results, longest)):
        print_line(sentence)
    if asked.compile:
        print_line(f"compiled in {found.compile_seconds:.1f} s, not counted above")


def show_cells(found: ModelEvaluation) -> None:
    """A table of a metric by depth and length, where a task has them."""
    from regpt.evals.suite import suite_rows

    for row in (row for suite, results in found.suites for row in suite_rows(suite, results) if "cells" in row):
        cells = row["cells"]
        head = (f"{row['task']} {row['metric']}", *(f"{length:,} tokens" for length in cells["lengths"]))
        print_rows(
            head,
            [
                (f"depth {depth} %", *("-" if value is None else f"{value:.2f}" for value in values))
                for depth, values in zip(cells["depths"], cells["values"])
            ],
        )


def write_all_items(folder: Path, found: ModelEvaluation) -> None:
    from regpt.runs.items import write_items

    try:
        for one in (one for _, results in found.suites for one in results):
            write_items(folder, one.task, one.item_lines(), found.opened.step or 0)
    except OSError as error:
        raise UserError(f"cannot write into {str(folder)!r} ({error.strerror}); choose another --items") from None
