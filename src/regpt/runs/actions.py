"""What a run does around its updates: rows of metrics, validation, samples, checkpoints."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt.checkpoint.save import Contents
from regpt.checkpoint.saver import Saver
from regpt.checkpoint.state import DataPosition, RunState, generator_states
from regpt.config import RunConfig
from regpt.console.text import counted
from regpt.data.batch import Batch
from regpt.data.bos import PackedRows
from regpt.data.loader import Loader
from regpt.data.mixture import MixedRows
from regpt.data.rows import Rows
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, state_tensors
from regpt.parallel.mesh import Mesh
from regpt.runs.build import Corpus, choose_kernels, mask_token, validation_parts
from regpt.runs.evaluations import RunEvaluations
from regpt.runs.examine import examine
from regpt.runs.folder import device_name, made_with
from regpt.runs.items import keep_items
from regpt.runs.rewind import go_back
from regpt.runs.terminal import Terminal
from regpt.runs.trackers import Sink
from regpt.runs.validation import Part, Validated, batch_items, own_sums, part_batches, result
from regpt.sample.generate import write_samples
from regpt.sample.sampling import SamplingOptions
from regpt.train.average import Average
from regpt.train.memory import memory_advice
from regpt.train.optim import optimizer_tensors
from regpt.train.precision import autocast
from regpt.train.schedule import make_schedule
from regpt.train.trainer import Actions, Row, Trainer, due
from regpt.train.updates import UpdateRatios

ADVICE = "set a smaller sample.n or sample.max_new_tokens"
SAMPLED_WINDOWS = 16  # a few milliseconds each; what the whole epoch leaves out is said by regpt data info


@dataclass(frozen=True)
class Job:
    """One run, as its actions see it. `metrics` and `samples` are None where this process writes no files."""

    config: RunConfig
    run: Path
    corpus: Corpus
    loader: Loader
    trainer: Trainer
    update_ratios: UpdateRatios
    evaluations: RunEvaluations
    terminal: Terminal
    metrics: Sink | None
    samples: Sink | None
    saver: Saver
    average: Average | None

    @property
    def mesh(self) -> Mesh:
        return self.trainer.mesh

    @property
    def model(self) -> Transformer:
        return self.trainer.model


def make_actions(job: Job, stop_requested: Callable[[], bool]) -> Actions:
    """The actions of `job`, for `Trainer.fit`."""
    parts = validation_parts(job.config, job.corpus)
    working = job.mesh.pulse.working  # none of it makes a process hung in the eyes of the others
    return Actions(
        log=working("writing its metrics")(lambda row: log(job, row)),
        validate=working("evaluating")(lambda step: evaluate(job, step, parts)),
        sample=working("sampling")(lambda step: sample(job, step)),
        save=working("writing a checkpoint")(lambda step: save(job, step)),
        # After a checkpoint that could not be written the run stops: all processes together, with a second try.
        stop_requested=lambda: stop_requested() or job.saver.failed,
        examine=working("examining a batch")(lambda: examine(job.trainer, job.loader, job.corpus.tokenizer)),
        rewind=working("going back to a checkpoint")(lambda: rewind(job)),
    )


def rewind(job: Job) -> None:
    """Go back to the newest valid checkpoint, and on with the batch after the present one: at once on the disk."""
    job.saver.wait()
    go_back(job.run, job.trainer, job.average)
    job.saver.note_step_back(job.trainer.step)
    save(job, job.trainer.step)


def log(job: Job, row: Row) -> None:
    """What is to be said after an update."""
    write_row(job, row)
    ratios = job.update_ratios.take()
    if ratios is not None:
        write_row(job, ratios | {"kind": "updates", "step": row["step"], "time": time.time()})
    write_saved_rows(job)


def write_row(job: Job, row: Row) -> None:
    """Show a row of metrics, and append it to metrics.jsonl when it is its turn."""
    job.terminal.row(row)
    step, every = int(row["step"]), job.config.log.every_steps  # type: ignore[call-overload]
    turn = row["kind"] != "train" or due(step, every) or step in (1, job.config.train.steps)
    if job.metrics is not None and turn:
        job.metrics.write(row)


def evaluate(job: Job, step: int, parts: Sequence[Part]) -> None:
    """Validate where there is held-out text, then the tasks."""
    if parts:
        validate(job, step, parts)
    for row in job.evaluations.rows(step):
        write_row(job, row)


@torch.no_grad()
def validate(job: Job, step: int, parts: Sequence[Part]) -> None:
    """Mean loss and bits per byte over the rows of `parts`, all processes together; also of each source."""
    lengths, eot = job.corpus.tokenizer.byte_lengths(), mask_token(job.config, job.corpus)

    items: list[dict[str, Any]] = []

    def own_share(rows: int) -> Tensor:
        items.clear()  # of an attempt that ran out of memory

        def batches(part: Part) -> Iterator[Batch]:
            return part_batches(part, job.mesh, rows, eot)

        def keep(part: Part, each: Tensor) -> None:
            items.extend(batch_items(part, each, rows, job.mesh))

        return own_sums(parts, batches, job.trainer.loss_sum, lengths, job.mesh.device, keep)

    def whole_result() -> Validated:
        return result(parts, job.mesh.total(job.trainer.micro_batch.attempt(own_share)))

    found = whole_result()
    everyone = [one for data in job.mesh.gather(json.dumps(items).encode()) for one in json.loads(data)]
    if job.mesh.is_main:
        lines = "".join(json.dumps(one) + "\n" for one in everyone)
        keep_items(job.run / "evals", "val", lines, step, job.terminal.say)
    averaged: Row = {}
    if job.average is not None:
        with job.average.applied():
            ema = whole_result().whole
        averaged = {"loss_ema": ema.loss, "bpb_ema": ema.bpb}
    for source, sums in {"": found.whole, **found.sources}.items():
        row: Row = {"kind": "val", "step": step, "loss": sums.loss, "bpb": sums.bpb, "stderr": sums.stderr}
        row |= {"bpb_stderr": sums.bpb_stderr, "tokens": sums.tokens, "time": time.time()}
        row |= {"source": source} if source else averaged
        write_row(job, row)
    if job.config.checkpoint.keep_best and step:  # random weights are no run's best
        unsaved = job.mesh.is_main and job.saver.is_best_unsaved(step, found.whole.loss)
        if job.mesh.any(unsaved):
            save(job, step)


def sample(job: Job, step: int) -> None:
    """Continue the prompts with the uncompiled model and a generator of its own, in the main process."""
    if job.samples is None:
        return
    config = job.config.sample
    options = SamplingOptions(temperature=config.temperature, top_k=config.top_k)
    lengths: dict[str, Any] = {"n": config.n, "max_new_tokens": config.max_new_tokens}
    for prompt in config.prompts:
        try:
            with autocast(job.config.train.precision, job.mesh.device), memory_advice("while sampling", ADVICE):
                tokenizer = job.corpus.tokenizer
                found = write_samples(job.model, tokenizer, prompt, **lengths, options=options, seed=config.seed)
        except UserError as error:  # the next update judges the weights; a sample never ends a run
            job.terminal.say(f"no sample after step {step:,}: {error}")
            return
        texts = [one.text for one in found]
        row = {"step": step, "prompt": prompt, "texts": texts, "time": time.time()}
        job.samples.write(row)
        job.terminal.say(f"sample after step {step:,}: {texts[0]!r}")


def save(job: Job, step: int) -> None:
    """Begin to write a checkpoint; what it needs to know of the other processes is collected first."""
    states = job.mesh.gather(json.dumps(generator_states(job.mesh.device)).encode())
    if not job.mesh.is_main:
        return
    try:
        job.saver.wait()
    except UserError as error:  # training stops here; see `stop_requested` in `make_actions`
        job.terminal.say(f"{error}; trying once more")
    contents = Contents(
        config=job.config.model,
        tokenizer=job.corpus.tokenizer,
        weights=state_tensors(job.model),
        optimizer=optimizer_tensors(job.model, job.trainer.optimizer),
        average=None if job.average is None else job.average.tensors(),
        state=run_state(job, step, [json.loads(state) for state in states]),
    )
    job.saver.save(contents, job.mesh.device)


def run_state(job: Job, step: int, random: list[dict[str, str]]) -> RunState:
    """What state.json says after `step` updates."""
    config = job.config
    data = config.data
    next_row = job.loader.first_row + (step + job.trainer.skipped) * job.loader.batch_rows
    lr = make_schedule(config.optim, config.train.steps)(step) if step else 0.0
    return RunState(
        step=step,
        data=DataPosition(job.corpus.manifest_sha256, next_row, data.seq_len, data.order, data.seed, data.shuffle_rows),
        schedule={"name": config.optim.schedule, "steps": config.train.steps, "lr": lr},
        trainer=job.trainer.state(),
        average_updates=job.average.updates if job.average else 0,
        random=tuple(random),
        config=config.sections(),
        made_with=made_with(job.mesh),
    )


def write_saved_rows(job: Job) -> None:
    """A row of metrics for every checkpoint that has been finished since the last call."""
    for saved in job.saver.take_done():
        write_row(job, {"kind": "event", "name": "checkpoint", **asdict(saved), "time": time.time()})


def summary(job: Job) -> str:
    """One line: what is trained, on what, how."""
    config, mesh = job.config, job.mesh
    name = device_name(mesh.device)
    B, T = job.trainer.micro_batch.rows, config.data.seq_len
    kernels = choose_kernels(config, job.model, mesh.device)
    spared = ", activation checkpointing" * config.train.activation_checkpointing
    spared += ", moments in host memory" * config.optim.offload
    return (
        f"{count_parameters(job.model):,} parameters on {mesh.world_size} × {name}, {config.train.precision}"
        f"{', compiled' if config.train.compile and kernels.name == 'plain' else ''}, {kernels.name} kernels "
        f"({kernels.reason}){spared}; {counted(config.train.batch_tokens, 'token')} a step "
        f"({config.train.batch_tokens // (B * mesh.world_size * T)} × {mesh.world_size} × {counted(B, 'row')} of {T}); "
        f"{job.corpus.tokens('train'):,} training tokens, tokenizer "
        f"{job.corpus.tokenizer.name}"
    )


def say_what_is_left_out(job: Job, rows: Rows) -> None:
    """One line for each folder in the order `bos`: how much of it no row holds, from its first windows."""
    for part in rows.parts if isinstance(rows, MixedRows) else [rows]:
        if isinstance(part, PackedRows):
            share = part.left_out(SAMPLED_WINDOWS)
            job.terminal.say(f"order bos leaves out about {share:.1%} of the tokens in {part.source}")


def write_epochs(job: Job, step: int, epochs: list[float]) -> None:
    """How many times each folder has been read."""
    times = {str(folder.path): round(n, 6) for folder, n in zip(job.corpus.folders, epochs)}
    write_row(job, {"kind": "event", "step": step, "name": "epochs", "epochs": times, "time": time.time()})
    if len(times) > 1:
        job.terminal.say("epochs read: " + ", ".join(f"{n:.3g} of {path}" for path, n in times.items()))
