"""The plan of a run: its sections and a device go in, a dictionary of plain values comes out (docs/plan.md)."""

import math
from pathlib import Path
from typing import Any

import psutil

from regpt.checkpoint.config import CheckpointConfig
from regpt.errors import UsageError
from regpt.tools.measure import busy, free_disk_bytes
from regpt.tools.plan import warn
from regpt.tools.plan.calibrate import calibrated_time
from regpt.tools.plan.memory import PlannedStep
from regpt.tools.plan.request import DataFacts, LossLaw, PlanRequest, RunSections
from regpt.tools.plan.room import CHECKPOINT_BYTES, GIB, Room, planned_step
from regpt.tools.plan.shape import Shape
from regpt.tools.plan.speed import StepTime, gpu_time, stated_time
from regpt.tools.plan.target import Target, target_of

WORD_BYTES = {True: 2, False: 4}  # of a token on disk: 16 bits are enough for 65,536
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: optimal for a given number of FLOPs
FORWARD_SHARE = 0.36  # of a micro-batch's time: its forward alone, as validation runs it (a third of the products)
START_SECONDS = {True: 45.0, False: 10.0}  # compiled or not: imports, building, the first step


def make_plan(run: RunSections, request: PlanRequest, facts: DataFacts | None = None) -> dict[str, Any]:
    """The plan; a few seconds, of which most is counting, and measuring where no data sheet is known.

    Raises:
        UsageError: a device or a combination that cannot be planned for.
    """
    load = busy()  # before anything is measured
    target = target_of(request.gpu, run.train.device, run.train.precision)
    if target.kind != "gpu" and request.gpus > 1:
        raise UsageError(f"--gpus is {request.gpus}, but this is planned for {target.name}; add --gpu NAME")
    step = planned_step(run, target)
    shape = step.shape
    batch_rows, rest = divmod(run.train.batch_tokens, run.data.seq_len * request.gpus)
    copy = CHECKPOINT_BYTES * shape.parameters if run.checkpoint.background else 0
    process_bytes = psutil.Process().memory_info().rss  # after the imports of a model, before tensors are counted
    room = Room(step, target, None if rest else batch_rows, process_bytes, copy)
    rows = room.rows(run.train.micro_batch_rows)
    memory = room.describe(rows)
    accumulation = math.ceil(run.train.batch_tokens / (run.data.seq_len * rows * request.gpus))
    time = step_time(run, request, target, step, rows, accumulation)
    tokens = run.train.steps * run.train.batch_tokens
    plan: dict[str, Any] = {
        "recipe": request.recipe,
        "machine": describe_target(target, request.gpus),
        "model": describe_model(shape),
        "run": describe_run(run, shape, rows, accumulation),
        "data": None if facts is None else describe_data(facts, tokens),
        "memory": memory,
        "disk": disk(run, shape, target, facts),
        "time": describe_time(run, request, target, shape, time, rows, facts),
        "loss": predicted(request.law, shape, tokens),
    }
    plan["cost"] = cost(request, plan["time"]["hours"])
    plan["warnings"] = [
        *warn.refusals(run.data, run.train, run.optim, request.gpus, rows),
        *warn.of_precision(run.train, target),
        *warn.of_memory(plan["memory"], rows),
        *warn.of_data(plan["data"], tokens, shape.parameters),
        *warn.of_disk(plan["disk"]),
        *warn.of_time(plan["time"]),
        *warn.of_figures(target, time, load),
    ]
    return plan


def step_time(
    run: RunSections, request: PlanRequest, target: Target, step: PlannedStep, rows: int, micro_batches: int
) -> StepTime:
    """Stated, from figures, or measured."""
    if request.mfu is not None:
        flops = run.train.batch_tokens * step.shape.flops_per_token / request.gpus
        return stated_time(request.mfu, flops, micro_batches, target.peak)
    if target.figures is not None and target.kind == "gpu":
        return gpu_time(step, rows, micro_batches, request.gpus, target.figures)
    assert target.here is not None
    given = {"rows": rows, "micro_batches": micro_batches}
    return calibrated_time(step, run.optim, **given, device=target.here, peak=target.peak)


def describe_target(target: Target, gpus: int) -> dict[str, Any]:
    return {
        "name": target.name,
        "kind": target.kind,
        "count": gpus,
        "memory_gib": target.memory / GIB,
        "peak_tflops": target.peak / 1e12,
        "how": target.how,
    }


def describe_model(shape: Shape) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "parameters_in_memory": shape.padded,
        "flops_per_token": shape.flops_per_token,
    }


def describe_run(run: RunSections, shape: Shape, rows: int, accumulation: int) -> dict[str, Any]:
    tokens = run.train.steps * run.train.batch_tokens
    return {
        "steps": run.train.steps,
        "batch_tokens": run.train.batch_tokens,
        "seq_len": run.data.seq_len,
        "micro_batch_rows": rows,
        "accumulation": accumulation,
        "precision": run.train.precision,
        "tokens": tokens,
        "tokens_per_parameter": tokens / shape.parameters,
        "optimal_tokens_per_parameter": TOKENS_PER_PARAMETER,
        "flops": tokens * shape.flops_per_token,
    }


def describe_data(facts: DataFacts, tokens: int) -> dict[str, Any]:
    return {
        "path": facts.path,
        "train_tokens": facts.train_tokens,
        "val_tokens": facts.val_tokens,
        "epochs": tokens / max(1, facts.train_tokens),
    }


def disk(run: RunSections, shape: Shape, target: Target, facts: DataFacts | None) -> dict[str, Any]:
    """Bytes of the data (one epoch, where none is given) and of the checkpoints when most of them are there."""
    word = WORD_BYTES[run.model.vocab_size <= 2**16]
    data = facts.disk_bytes if facts else word * run.train.steps * run.train.batch_tokens
    one = CHECKPOINT_BYTES * shape.parameters
    kept = kept_checkpoints(run.checkpoint, run.train.steps)
    return {
        "data_gib": data / GIB,
        "data_is": "given" if facts else "one epoch",
        "checkpoint_gib": one / GIB,
        "checkpoints": kept,
        "checkpoints_gib": kept * one / GIB,
        "free_gib": free_disk_bytes(Path.cwd()) / GIB if target.here is not None else None,
    }


def kept_checkpoints(config: CheckpointConfig, steps: int) -> int:
    """Most checkpoints at a time: an old one is deleted after the new one is there."""
    saved = math.ceil(steps / config.every_steps) if config.every_steps else 1
    if not config.keep_last:
        return saved
    for_ever = steps // config.keep_every if config.keep_every else 0
    return min(saved, config.keep_last + 1 + for_ever)


def describe_time(
    run: RunSections,
    request: PlanRequest,
    target: Target,
    shape: Shape,
    time: StepTime,
    rows: int,
    facts: DataFacts | None,
) -> dict[str, Any]:
    train = run.train
    validation = validation_seconds(run, request.gpus, time, rows, facts)
    return {
        "step_ms": time.seconds * 1e3,
        "parts_ms": {name: part * 1e3 for name, part in time.parts.items()},
        "tokens_per_s": train.batch_tokens / time.seconds,
        "mfu": train.batch_tokens * shape.flops_per_token / time.seconds / (target.peak * request.gpus),
        "validation_hours": validation / 3600,
        "hours": (train.steps * time.seconds + validation + START_SECONDS[train.compile]) / 3600,
        "how": time.how,
    }


def validation_seconds(run: RunSections, gpus: int, time: StepTime, rows: int, facts: DataFacts | None) -> float:
    """All validations of the run: a forward over `eval.val_tokens` each time."""
    there = facts.val_tokens if facts else run.eval.val_tokens
    tokens = min(run.eval.val_tokens or there, there)
    times = 2 + ((run.train.steps - 1) // run.eval.every_steps if run.eval.every_steps else 0)
    batches = math.ceil(tokens / (rows * run.data.seq_len * gpus))
    return times * batches * FORWARD_SHARE * time.micro_batch


def predicted(law: LossLaw | None, shape: Shape, tokens: int) -> dict[str, Any] | None:
    if law is None:
        return None
    parameters = shape.parameters - (shape.embeddings if law.parameters == "non-embedding" else 0)
    return {
        "loss": law.loss(parameters, tokens),
        "unit": law.unit,
        "standard_error": law.standard_error(parameters, tokens),
        "parameters": parameters,
        "tokens": tokens,
    }


def cost(request: PlanRequest, hours: float) -> dict[str, Any] | None:
    if request.price is None:
        return None
    gpu_hours = hours * request.gpus
    return {"price_per_gpu_hour": request.price, "gpu_hours": gpu_hours, "total": gpu_hours * request.price}
