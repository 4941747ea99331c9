"""The stages of a planned run: what a step computes there, the micro-batch that has room, and the time of a step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil

from regpt.config import RunConfig
from regpt.data.ramp import rows_in_stage
from regpt.errors import UsageError
from regpt.kernels.select import MEASURED_CAPABILITY, model_obstacle, select_kernels
from regpt.model.families import make_model
from regpt.model.weights import without_memory
from regpt.runs.build import run_stages
from regpt.runs.rollouts import MOST_ROWS
from regpt.tools.plan.memory import PlannedStep, StepMemory, cpu_memory, gpu_memory
from regpt.tools.plan.speed import StepTime, Target, calibrated_time, gpu_time, stated_time
from regpt.train.memory import available_memory
from regpt.train.probe import row_choices

GIB = 2**30
ROWS_ON_CPU = 8  # of `auto`, which tries there what is fastest


def planned_step(config: RunConfig, target: Target) -> PlannedStep:
    train = config.train
    return PlannedStep(
        config.model,
        config.data.seq_len,
        path_name(config, target),
        train.precision,
        pad_vocab=train.pad_vocab,
        checkpointing=train.activation_checkpointing,
        offload=config.optim.offload and target.kind != "cpu",  # where all memory is the host's
        document_mask=config.data.document_mask,
        weights=train.weight_dtype,
        gradients=train.grad_dtype,
        state=config.optim.state_dtype,
        blocks=train.compile_blocks,
        activation_offload=train.activation_offload and target.kind != "cpu",
        adapter=config.adapter,
        mlp_tokens=train.mlp_tokens,
        **planned_rollouts(config, target),
    )


def planned_rollouts(config: RunConfig, target: Target) -> dict[str, Any]:
    """What a step of GRPO holds besides: replies that are written at once, and other weights."""
    if not config.grpo.tasks:
        return {}
    rows = config.train.batch_tokens // config.data.seq_len * config.grpo.updates
    halved = target.kind != "cpu" and config.train.autocast_precision in ("bf16", "fp16")
    copies = 2.0 * halved + 4.0 * (config.grpo.beta > 0)
    return {"reply_tokens": config.grpo.max_new_tokens, "written": min(rows, MOST_ROWS), "copies_bytes": copies}


def checkpoint_bytes(step: PlannedStep) -> float:
    """Of weights and moments, without padding, which is little."""
    shape = step.shape
    if shape.adapted:  # the base is stored once
        return step.gradient_bytes * shape.learned + step.moment_bytes
    return (step.weight_bytes + step.moment_bytes / shape.padded) * shape.parameters


def path_name(config: RunConfig, target: Target) -> str:
    """eager, compiled or fused: as `regpt train` would choose on that device."""
    train = config.train
    plain = "compiled" if train.compile else "eager"
    unlike = config.adapter.r or config.preference.method or config.grpo.tasks or train.z_loss or train.mlp_tokens
    if train.kernels == "plain" or train.weight_dtype == "bf16" or unlike:
        return plain
    with without_memory():
        empty = make_model(config.model, pad_vocab=train.pad_vocab)
    how = {"deterministic": train.deterministic, "recompute": train.activation_checkpointing}
    how |= {"offload": train.activation_offload}
    if target.here is not None:
        chosen = select_kernels(train.kernels, empty, target.here, train.precision, **how)
        return "fused" if chosen.name == "fused" else plain
    reason = model_obstacle(empty, train.precision, **how)
    if train.kernels == "fused" and reason is not None:
        raise UsageError(f"train.kernels is fused, but {reason}; set train.kernels to plain or auto")
    major, minor = MEASURED_CAPABILITY
    capability = (target.figures.capability if target.figures else None) or 0.0
    return "fused" if reason is None and (train.kernels == "fused" or capability >= major + minor / 10) else plain


@dataclass(frozen=True)
class Room:
    """Memory of a step with any number of rows, and that of the device.

    Attributes:
        choices: micro-batches that divide the batch; powers of two where nothing does.
        process_bytes: Python and the libraries in memory.
        checkpoint_copy: bytes that a checkpoint written in the background holds on a CPU.
    """

    step: PlannedStep
    target: Target
    choices: list[int]
    process_bytes: int = 0
    checkpoint_copy: float = 0

    def memory(self, rows: int) -> StepMemory:
        if self.target.kind == "cpu":
            return cpu_memory(self.step, rows, self.process_bytes, self.checkpoint_copy)
        return gpu_memory(self.step, rows)

    def available(self) -> float:
        """Bytes that the run may take: all of a GPU, what is free of this host."""
        return available_memory() + self.process_bytes if self.target.kind == "cpu" else self.target.memory

    def largest(self) -> int | None:
        """The largest micro-batch that fits; None where not even one row does."""
        return max((n for n in self.choices if self.memory(n).needed <= self.available()), default=None)

    def rows(self, wanted: int | str) -> int:
        """The configured micro-batch; for `auto` the largest that fits, on a CPU a few rows."""
        if isinstance(wanted, int):
            return wanted
        largest = self.largest() or 1
        if self.target.kind == "cpu":
            return max(n for n in self.choices if n <= min(ROWS_ON_CPU, largest))
        return largest

    def describe(self, rows: int) -> dict[str, Any]:
        memory, free = self.memory(rows), self.available()
        return {
            "path": self.step.path,
            "of": "the process" if self.target.kind == "cpu" else "tensors",
            "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
            "peak_gib": memory.peak / GIB,
            "host_gib": self.step.moment_bytes / GIB if self.step.offload else 0.0,
            "needed_gib": memory.needed / GIB,
            "available_gib": free / GIB,
            "fits": memory.needed <= free,
            "largest_micro_batch_rows": self.largest(),
        }


def make_room(config: RunConfig, step: PlannedStep, target: Target, gpus: int) -> Room:
    batch_rows, rest = divmod(config.train.batch_tokens, config.data.seq_len * gpus)
    choices = [2**n for n in range(11)] if rest or not batch_rows else row_choices(batch_rows)
    copy = checkpoint_bytes(step) if config.checkpoint.background else 0
    resident = psutil.Process().memory_info().rss  # after the imports of a model, before tensors are counted
    return Room(step, target, choices, resident, copy)


# ---- stages: one, or those of train.batch_ramp


@dataclass(frozen=True)
class PlannedStage:
    """So many steps of one batch and row length."""

    steps: int
    batch_tokens: int
    seq_len: int
    rows: int
    accumulation: int
    room: Room
    time: StepTime

    @property
    def step(self) -> PlannedStep:
        return self.room.step

    @property
    def flops(self) -> float:
        return self.steps * self.batch_tokens * self.step.shape.flops_per_token


def planned_stages(config: RunConfig, target: Target, gpus: int, mfu: float | None) -> Iterator[PlannedStage]:
    """Stages that have steps; as in training, micro-batches of the later ones keep the tokens of the first's."""
    stages, train = run_stages(config), config.train
    ends = [*(stage.first_step for stage in stages[1:]), train.steps]
    first_rows = 0
    for stage, end in zip(stages, ends):
        if stage.first_step >= train.steps:
            return
        B, T = stage.batch_tokens, stage.seq_len
        own = replace(config, train=replace(train, batch_ramp=(), batch_tokens=B), data=replace(config.data, seq_len=T))
        room = make_room(own, planned_step(own, target), target, gpus)
        if not first_rows:
            rows = first_rows = room.rows(train.micro_batch_rows)
        else:
            shared = gpus <= B // T  # else `refusals` has a sentence
            rows = rows_in_stage(first_rows, config.data.seq_len, stage, gpus) if shared else 1
        accumulation = math.ceil(B / (T * rows * gpus))
        time = step_time(own, target, room.step, rows, accumulation, gpus, mfu)
        yield PlannedStage(min(end, train.steps) - stage.first_step, B, T, rows, accumulation, room, time)


def step_time(
    config: RunConfig, target: Target, step: PlannedStep, rows: int, micro_batches: int, gpus: int, mfu: float | None
) -> StepTime:
    """Stated, from figures, or measured."""
    if mfu is not None:
        flops = config.train.batch_tokens * step.shape.flops_per_token / gpus
        return stated_time(mfu, flops, micro_batches, target.peak)
    if target.figures is not None and target.kind == "gpu":
        return gpu_time(step, rows, micro_batches, gpus, target.figures)
    assert target.here is not None
    given = {"rows": rows, "micro_batches": micro_batches}
    return calibrated_time(step, config.optim, **given, device=target.here, peak=target.peak)
