"""The plan of a run: its sections and a machine go in, a dictionary of plain values comes out (docs/plan.md)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regpt.checkpoint.config import CheckpointConfig
from regpt.data.config import DataConfig
from regpt.errors import UsageError
from regpt.evals.config import EvalConfig
from regpt.kernels.select import MEASURED_CAPABILITY, choose
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.tools.measure import free_disk_bytes, resident_bytes
from regpt.tools.plan import warn
from regpt.tools.plan.calibrate import calibrated_speed
from regpt.tools.plan.coefficients import FORWARD_SHARE, START_SECONDS, TOKENS_PER_PARAMETER
from regpt.tools.plan.machine import Machine, machine_of
from regpt.tools.plan.memory import Memory, Settings, cpu_memory, gpu_memory, largest_rows
from regpt.tools.plan.scaling import Law
from regpt.tools.plan.shape import Shape, shape_of
from regpt.tools.plan.speed import Speed, gpu_speed, speed_at
from regpt.train.capacity import available_memory
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.probe import row_choices

GIB = 2**30
ROWS_ON_CPU = 8  # of `auto`, which tries there what is fastest
CHECKPOINT_BYTES = 12  # per parameter: float32 weights and two moments
WORD_BYTES = {True: 2, False: 4}  # of a token on disk: 16 bits are enough for 65,536


@dataclass(frozen=True)
class Sections:
    """Of the run's configuration."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


@dataclass(frozen=True)
class Request:
    """What is asked for beside the configuration.

    Attributes:
        gpu: a name from the table, `cpu`, or empty for this machine.
        price: of an hour of one GPU, in whatever currency.
        mfu: to reckon with, in place of the predicted one.
        law: that predicts the loss.
    """

    recipe: str
    gpu: str = ""
    gpus: int = 1
    price: float | None = None
    mfu: float | None = None
    law: Law | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus is {self.gpus}, must be at least 1")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UsageError(f"--price is {self.price}, must be 0 or more, for an hour of one GPU")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu is {self.mfu}, must be above 0 and at most 1, such as 0.4")


@dataclass(frozen=True)
class DataFacts:
    """Of the data that was given."""

    path: str
    train_tokens: int
    val_tokens: int
    disk_bytes: int


def make_plan(run: Sections, request: Request, facts: DataFacts | None = None) -> dict[str, Any]:
    """The plan; a second or two, of which most is measuring where no data sheet is known.

    Raises:
        UsageError: a machine or a combination that cannot be planned for.
    """
    shape = shape_of(run.model, run.data.seq_len, pad_vocab=run.train.pad_vocab)
    process_bytes = resident_bytes()  # after a model was built (that imports much), before anything is measured
    machine = machine_of(request.gpu, run.train.device, run.train.precision)
    if machine.kind != "gpu" and request.gpus > 1:
        raise UsageError(f"--gpus is {request.gpus}, but this is planned for {machine.name}; add --gpu NAME")
    settings = Settings(path_name(run, machine), run.train.precision, document_mask=run.data.document_mask)
    rooms = Rooms(run, request, machine, shape, settings, process_bytes)
    rows = rooms.rows()
    memory = rooms.describe(rows)
    speed = speed_of(run, request, machine, shape, settings, rows)
    tokens = run.train.steps * run.train.batch_tokens
    data = None if facts is None else {"path": facts.path, **epochs(facts, tokens)}
    plan = {
        "recipe": request.recipe,
        "machine": describe_machine(machine, request.gpus),
        "model": describe_model(shape),
        "run": describe_run(run, shape, rows, request.gpus),
        "data": data,
        "memory": memory,
        "disk": disk(run, shape, machine, facts),
        "time": time_of(run, request, machine, shape, speed, rows, facts),
        "loss": predicted(request.law, shape.parameters, tokens),
    }
    plan["cost"] = cost(request, plan["time"]["hours"])
    plan["warnings"] = warnings(run, request, machine, plan, rows)
    return plan


def path_name(run: Sections, machine: Machine) -> str:
    """eager, compiled or fused: as `regpt train` would choose on that machine."""
    train, model = run.train, run.model
    plain = "compiled" if train.compile else "eager"
    if train.kernels == "plain":
        return plain
    if machine.here is not None:
        with torch.device("meta"):
            empty = Transformer(model, pad_vocab=train.pad_vocab)
        return "fused" if choose(train.kernels, empty, machine.here, train.precision).name == "fused" else plain
    if train.kernels == "fused":
        return "fused"
    head = model.n_embd // model.n_head
    suits = train.precision == "bf16" and model.n_embd % 8 == 0 and head % 8 == 0 and head <= 128
    suits = suits and (train.pad_vocab or model.vocab_size % 8 == 0)
    major, minor = MEASURED_CAPABILITY
    capability = machine.figures.capability if machine.figures else None
    return "fused" if suits and (capability or 0.0) >= major + minor / 10 else plain


@dataclass(frozen=True)
class Rooms:
    """Memory of the run with any number of rows."""

    run: Sections
    request: Request
    machine: Machine
    shape: Shape
    settings: Settings
    process_bytes: int | None

    def choices(self) -> list[int]:
        """Micro-batches that divide the batch; powers of two where nothing does."""
        batch_rows, rest = divmod(self.run.train.batch_tokens, self.run.data.seq_len * self.request.gpus)
        return [2**n for n in range(11)] if rest or not batch_rows else row_choices(batch_rows)

    def memory(self, rows: int) -> Memory:
        if self.machine.kind == "cpu":
            copy = CHECKPOINT_BYTES * self.shape.parameters if self.run.checkpoint.background else 0
            process = {} if self.process_bytes is None else {"process_bytes": self.process_bytes}
            return cpu_memory(self.shape, rows, self.settings, self.run.model.vocab_size, copy, **process)
        return gpu_memory(self.shape, rows, self.settings)

    def available(self) -> float | None:
        """Bytes that the run may take: of a GPU all of it, of this host what is free."""
        if self.machine.kind == "cpu":
            free = available_memory()
            return free if free is None else float(free + (self.process_bytes or 0))
        return self.machine.memory

    def largest(self) -> int | None:
        room = self.available()
        return None if room is None else largest_rows(self.choices(), lambda rows: self.memory(rows).needed, room)

    def rows(self) -> int:
        """The configured micro-batch; for `auto` the largest that fits, on a CPU a few rows."""
        rows = self.run.train.micro_batch_rows
        if rows != "auto":
            return rows
        largest = self.largest() or 1
        if self.machine.kind == "cpu":
            return max(n for n in self.choices() if n <= min(ROWS_ON_CPU, largest))
        return largest

    def describe(self, rows: int) -> dict[str, Any]:
        memory, room = self.memory(rows), self.available()
        return {
            "path": self.settings.path,
            "of": "the process" if self.machine.kind == "cpu" else "tensors",
            "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
            "peak_gib": memory.peak / GIB,
            "needed_gib": memory.needed / GIB,
            "available_gib": None if room is None else room / GIB,
            "fits": None if room is None else memory.needed <= room,
            "largest_micro_batch_rows": self.largest(),
        }


def speed_of(run: Sections, request: Request, machine: Machine, shape: Shape, settings: Settings, rows: int) -> Speed:
    """Stated, from figures, or measured."""
    train = run.train
    micro_batches = math.ceil(train.batch_tokens / (run.data.seq_len * rows * request.gpus))
    if request.mfu is not None:
        flops = train.batch_tokens * shape.flops_per_token / request.gpus
        return speed_at(request.mfu, flops, micro_batches, machine.peak)
    if machine.kind == "gpu":
        assert machine.figures is not None
        path, precision = settings.path, train.precision
        return gpu_speed(shape, rows, micro_batches, request.gpus, machine.figures, path_name=path, precision=precision)
    assert machine.here is not None
    return calibrated_speed(
        run.model,
        train,
        run.optim,
        seq_len=run.data.seq_len,
        rows=rows,
        micro_batches=micro_batches,
        device=machine.here,
        peak=machine.peak,
    )


def describe_machine(machine: Machine, gpus: int) -> dict[str, Any]:
    return {
        "name": machine.name,
        "kind": machine.kind,
        "count": gpus,
        "memory_gib": None if machine.memory is None else machine.memory / GIB,
        "peak_tflops": machine.peak / 1e12,
        "how": machine.how,
    }


def describe_model(shape: Shape) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "parameters_in_memory": shape.padded,
        "flops_per_token": shape.flops_per_token,
    }


def describe_run(run: Sections, shape: Shape, rows: int, gpus: int) -> dict[str, Any]:
    tokens = run.train.steps * run.train.batch_tokens
    return {
        "steps": run.train.steps,
        "batch_tokens": run.train.batch_tokens,
        "seq_len": run.data.seq_len,
        "micro_batch_rows": rows,
        "accumulation": math.ceil(run.train.batch_tokens / (run.data.seq_len * rows * gpus)),
        "precision": run.train.precision,
        "tokens": tokens,
        "tokens_per_parameter": tokens / shape.parameters,
        "optimal_tokens_per_parameter": TOKENS_PER_PARAMETER,
        "flops": tokens * shape.flops_per_token,
    }


def epochs(facts: DataFacts, tokens: int) -> dict[str, Any]:
    return {
        "train_tokens": facts.train_tokens,
        "val_tokens": facts.val_tokens,
        "epochs": tokens / max(1, facts.train_tokens),
    }


def disk(run: Sections, shape: Shape, machine: Machine, facts: DataFacts | None) -> dict[str, Any]:
    """Bytes of the data (once through it, where none is given) and of the checkpoints when most of them are there."""
    word = WORD_BYTES[run.model.vocab_size <= 2**16]
    data = facts.disk_bytes if facts else word * run.train.steps * run.train.batch_tokens
    one = CHECKPOINT_BYTES * shape.parameters
    kept = kept_checkpoints(run.checkpoint, run.train.steps)
    free = free_disk_bytes(Path.cwd()) / GIB if machine.here is not None else None
    return {
        "data_gib": data / GIB,
        "data_is": "given" if facts else "one epoch",
        "checkpoint_gib": one / GIB,
        "checkpoints": kept,
        "checkpoints_gib": kept * one / GIB,
        "free_gib": free,
    }


def kept_checkpoints(config: CheckpointConfig, steps: int) -> int:
    """Most checkpoints at a time: an old one is deleted after the new one is there."""
    saved = math.ceil(steps / config.every_steps) if config.every_steps else 1
    if not config.keep_last:
        return saved
    for_ever = steps // config.keep_every if config.keep_every else 0
    return min(saved, config.keep_last + 1 + for_ever)


def time_of(
    run: Sections,
    request: Request,
    machine: Machine,
    shape: Shape,
    speed: Speed,
    rows: int,
    facts: DataFacts | None,
) -> dict[str, Any]:
    train, seconds = run.train, speed.seconds
    flops = train.batch_tokens * shape.flops_per_token
    validation = validation_seconds(run, request.gpus, speed, rows, facts)
    total = train.steps * seconds + validation + START_SECONDS[train.compile]
    return {
        "step_ms": seconds * 1e3,
        "parts_ms": {name: part * 1e3 for name, part in speed.parts.items()},
        "tokens_per_s": train.batch_tokens / seconds,
        "mfu": flops / seconds / (machine.peak * request.gpus),
        "validation_hours": validation / 3600,
        "hours": total / 3600,
        "how": speed.how,
    }


def validation_seconds(run: Sections, gpus: int, speed: Speed, rows: int, facts: DataFacts | None) -> float:
    """Of all validations of the run: a forward over `eval.val_tokens` each time."""
    there = facts.val_tokens if facts else run.eval.val_tokens
    tokens = min(run.eval.val_tokens or there, there)
    times = 2 + ((run.train.steps - 1) // run.eval.every_steps if run.eval.every_steps else 0)
    batches = math.ceil(tokens / (rows * run.data.seq_len * gpus))
    return times * batches * FORWARD_SHARE * speed.micro_batch


def predicted(law: Law | None, parameters: int, tokens: int) -> dict[str, Any] | None:
    if law is None:
        return None
    error = law.standard_error(parameters, tokens)
    return {"loss": law.loss(parameters, tokens), "standard_error": error, "parameters": parameters, "tokens": tokens}


def cost(request: Request, hours: float) -> dict[str, Any] | None:
    if request.price is None:
        return None
    gpu_hours = hours * request.gpus
    return {"price_per_gpu_hour": request.price, "gpu_hours": gpu_hours, "total": gpu_hours * request.price}


def warnings(run: Sections, request: Request, machine: Machine, plan: dict[str, Any], rows: int) -> list[str]:
    return [
        *warn.refusals(run.data, run.train, run.optim, request.gpus, rows),
        *warn.of_precision(run.train, machine),
        *warn.of_memory(plan["memory"], rows),
        *warn.of_data(plan["data"], plan["run"]["tokens"], plan["model"]["parameters"]),
        *warn.of_disk(plan["disk"]),
        *warn.of_time(plan["time"]),
    ]
