"""The plan of a run: its sections and a machine go in, a dictionary of plain values comes out (docs/plan.md)."""

import math
from pathlib import Path
from typing import Any

from regpt.checkpoint.config import CheckpointConfig
from regpt.errors import UsageError
from regpt.tools.load import busy
from regpt.tools.measure import free_disk_bytes, resident_bytes
from regpt.tools.plan import warn
from regpt.tools.plan.calibrate import calibrated_speed
from regpt.tools.plan.coefficients import CHECKPOINT_BYTES, FORWARD_SHARE, START_SECONDS, TOKENS_PER_PARAMETER
from regpt.tools.plan.machine import Machine, machine_of
from regpt.tools.plan.memory import Settings
from regpt.tools.plan.request import DataFacts, Request, Sections
from regpt.tools.plan.room import GIB, Rooms, settings_of
from regpt.tools.plan.scaling import Law
from regpt.tools.plan.shape import Shape, shape_of
from regpt.tools.plan.speed import Speed, gpu_speed, speed_at

WORD_BYTES = {True: 2, False: 4}  # of a token on disk: 16 bits are enough for 65,536


def make_plan(run: Sections, request: Request, facts: DataFacts | None = None) -> dict[str, Any]:
    """The plan; a second or two, of which most is measuring where no data sheet is known.

    Raises:
        UsageError: a machine or a combination that cannot be planned for.
    """
    load = busy()  # before anything is measured
    shape = shape_of(run.model, run.data.seq_len, pad_vocab=run.train.pad_vocab)
    process_bytes = resident_bytes()  # after a model was built (that imports much), before anything is measured
    machine = machine_of(request.gpu, run.train.device, run.train.precision)
    if machine.kind != "gpu" and request.gpus > 1:
        raise UsageError(f"--gpus is {request.gpus}, but this is planned for {machine.name}; add --gpu NAME")
    settings = settings_of(run, machine)
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
        "loss": predicted(request.law, shape, tokens),
    }
    plan["cost"] = cost(request, plan["time"]["hours"])
    plan["warnings"] = [*warnings(run, request, machine, plan, rows), *warn.of_figures(machine, speed, load)]
    return plan


def speed_of(run: Sections, request: Request, machine: Machine, shape: Shape, settings: Settings, rows: int) -> Speed:
    """Stated, from figures, or measured."""
    train = run.train
    micro_batches = math.ceil(train.batch_tokens / (run.data.seq_len * rows * request.gpus))
    if request.mfu is not None:
        flops = train.batch_tokens * shape.flops_per_token / request.gpus
        return speed_at(request.mfu, flops, micro_batches, machine.peak)
    if machine.kind == "gpu":
        assert machine.figures is not None
        return gpu_speed(shape, rows, micro_batches, request.gpus, machine.figures, settings)
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


def predicted(law: Law | None, shape: Shape, tokens: int) -> dict[str, Any] | None:
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
