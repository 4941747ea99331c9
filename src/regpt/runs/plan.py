"""The plan of a run, before it runs: configuration and device in, plain values out (docs/plan.md)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from regpt.checkpoint.config import CheckpointConfig
from regpt.config import RunConfig
from regpt.data.loader import check_batch
from regpt.errors import UsageError
from regpt.kernels.select import MEASURED_CAPABILITY, model_obstacle, select_kernels
from regpt.model.families import make_model
from regpt.model.weights import without_memory
from regpt.runs.build import Corpus
from regpt.tools.measure import busy, free_disk_bytes
from regpt.tools.plan.memory import PlannedStep, StepMemory, cpu_memory, gpu_memory
from regpt.tools.plan.speed import StepTime, Target, calibrated_time, gpu_time, planned_target, stated_time
from regpt.train.config import TrainConfig
from regpt.train.memory import available_memory
from regpt.train.probe import row_choices
from regpt.train.schedule import make_schedule

GIB = 2**30
ROWS_ON_CPU = 8  # of `auto`, which tries there what is fastest
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: optimal for a given number of FLOPs
FORWARD_SHARE = 0.36  # of a micro-batch's time: its forward alone, as validation runs it (a third of the products)
START_SECONDS = {True: 45.0, False: 10.0}  # compiled or not: imports, building, the first step
GOOD_EPOCHS = 4  # Muennighoff et al. 2023: up to four epochs are nearly as good as new data
USELESS_EPOCHS = 16  # the same: after about sixteen, repeating brings almost nothing
FEW_TOKENS_PER_PARAMETER = 0.5  # a fortieth of what is optimal
SMALL_SHARE = 0.25  # of a micro-batch: smaller products reach less of the peak


def make_plan(
    config: RunConfig,
    recipe: str,
    *,
    gpu: str = "",
    gpus: int = 1,
    price: float | None = None,
    mfu: float | None = None,
    corpus: Corpus | None = None,
) -> dict[str, Any]:
    """The plan; a few seconds, of which most is counting, and measuring where no data sheet is known.

    Args:
        gpu: a name from the table of data sheets, `cpu`, or empty for this machine.
        price: of one GPU for an hour, in any currency.
        mfu: to calculate with, instead of the predicted one.

    Raises:
        UsageError: a device or a combination that cannot be planned for.
    """
    if config.train.batch_ramp:
        raise UsageError(
            "regpt plan plans one batch and train.batch_ramp has several; plan each stage by itself, with "
            "--train.batch-ramp without values and its own --train.batch-tokens, --data.seq-len and --train.steps"
        )
    load = busy()  # before anything is measured
    target = planned_target(gpu, config.train.device, config.train.precision)
    if target.kind != "gpu" and gpus > 1:
        raise UsageError(f"--gpus is {gpus}, but this is planned for {target.name}; add --gpu NAME")
    step = planned_step(config, target)
    room = make_room(config, step, target, gpus)
    rows = room.rows(config.train.micro_batch_rows)
    run = describe_run(config, step, rows, gpus)
    time = step_time(config, target, step, rows, run["accumulation"], gpus, mfu)
    tokens = run["tokens"]
    plan: dict[str, Any] = {
        "recipe": recipe,
        "machine": describe_target(target, gpus),
        "model": describe_model(step),
        "run": run,
        "data": describe_data(corpus, tokens) if corpus else None,
        "memory": room.describe(rows),
        "disk": disk(config, checkpoint_bytes(step), target, corpus),
        "time": describe_time(config, target, step, time, rows, gpus, corpus),
        "cost": None,
    }
    if price is not None:
        hours = plan["time"]["hours"] * gpus
        plan["cost"] = {"price_per_gpu_hour": price, "gpu_hours": hours, "total": hours * price}
    warnings = [*refusals(config, gpus, rows), *unsuitable_device(config.train, target), *doubtful_choices(plan)]
    return plan | {"warnings": [*warnings, *doubtful_figures(target, time, load)]}


# ---- the step, and the rows that have room


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
    )


def checkpoint_bytes(step: PlannedStep) -> float:
    """Of weights and moments, without padding, which is little."""
    shape = step.shape
    return (step.weight_bytes + step.moment_bytes / shape.padded) * shape.parameters


def path_name(config: RunConfig, target: Target) -> str:
    """eager, compiled or fused: as `regpt train` would choose on that device."""
    train = config.train
    plain = "compiled" if train.compile else "eager"
    if train.kernels == "plain" or train.weight_dtype == "bf16":
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


# ---- sections of the plan


def describe_target(target: Target, gpus: int) -> dict[str, Any]:
    return {
        "name": target.name,
        "kind": target.kind,
        "count": gpus,
        "memory_gib": target.memory / GIB,
        "peak_tflops": target.peak / 1e12,
        "how": target.how,
    }


def describe_model(step: PlannedStep) -> dict[str, Any]:
    shape = step.shape
    sizes = {"parameters": shape.parameters, "active_parameters": shape.active, "parameters_in_memory": shape.padded}
    return sizes | {"flops_per_token": shape.flops_per_token}


def describe_run(config: RunConfig, step: PlannedStep, rows: int, gpus: int) -> dict[str, Any]:
    train, seq_len = config.train, config.data.seq_len
    tokens = train.steps * train.batch_tokens
    return {
        "steps": train.steps,
        "batch_tokens": train.batch_tokens,
        "seq_len": seq_len,
        "micro_batch_rows": rows,
        "accumulation": math.ceil(train.batch_tokens / (seq_len * rows * gpus)),
        "precision": train.precision,
        "tokens": tokens,
        "tokens_per_parameter": tokens / step.shape.parameters,
        "optimal_tokens_per_parameter": TOKENS_PER_PARAMETER,
        "flops": tokens * step.shape.flops_per_token,
    }


def describe_data(corpus: Corpus, tokens: int) -> dict[str, Any]:
    path, train = " + ".join(str(folder.path) for folder in corpus.folders), corpus.tokens("train")
    val, epochs = corpus.tokens("val"), tokens / max(1, train)
    return {"path": path, "train_tokens": train, "val_tokens": val, "epochs": epochs}


def disk(config: RunConfig, checkpoint: float, target: Target, corpus: Corpus | None) -> dict[str, Any]:
    """Bytes of the data (one epoch, where none is given) and of the checkpoints when most of them are there."""
    word = 2 if config.model.vocab_size <= 2**16 else 4  # bytes of a token
    data = word * config.train.steps * config.train.batch_tokens
    if corpus:
        manifests = [folder.manifest for folder in corpus.folders]
        shards = [(shard, manifest.numpy_dtype.itemsize) for manifest in manifests for shard in manifest.shards]
        data = sum(shard.tokens * word + 8 * shard.documents for shard, word in shards)
    one, kept = checkpoint, kept_checkpoints(config.checkpoint, config.train.steps)
    return {
        "data_gib": data / GIB,
        "data_is": "given" if corpus else "one epoch",
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
    return min(saved, config.keep_last + 1 + (steps // config.keep_every if config.keep_every else 0))


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


def describe_time(
    config: RunConfig, target: Target, step: PlannedStep, time: StepTime, rows: int, gpus: int, corpus: Corpus | None
) -> dict[str, Any]:
    """Of a step and of the run with its validations, each a forward over `eval.val_tokens`, and its start."""
    train, every = config.train, config.eval.every_steps
    there = corpus.tokens("val") if corpus else config.eval.val_tokens
    batches = math.ceil(min(config.eval.val_tokens or there, there) / (rows * config.data.seq_len * gpus))
    validation = (2 + ((train.steps - 1) // every if every else 0)) * batches * FORWARD_SHARE * time.micro_batch
    return {
        "step_ms": time.seconds * 1e3,
        "parts_ms": {name: part * 1e3 for name, part in time.parts.items()},
        "tokens_per_s": train.batch_tokens / time.seconds,
        "mfu": train.batch_tokens * step.shape.flops_per_token / time.seconds / (target.peak * gpus),
        "validation_hours": validation / 3600,
        "hours": (train.steps * time.seconds + validation + START_SECONDS[train.compile]) / 3600,
        "how": time.how,
    }


# ---- warnings, one sentence each


def refusals(config: RunConfig, gpus: int, rows: int) -> Iterator[str]:
    """Why `regpt train` would not start, or not do what is meant."""
    train, warmup = config.train, config.optim.warmup_steps
    for check in (
        lambda: check_batch(config.data.seq_len, train.batch_tokens, rows, gpus),
        lambda: make_schedule(config.optim, train.steps),
    ):
        try:
            check()
        except UsageError as error:
            yield f"regpt train will refuse this: {error}"
    if warmup >= train.steps:
        yield f"the warmup of {warmup:,} steps is as long as the run ({train.steps:,}): shorten optim.warmup_steps"


def unsuitable_device(train: TrainConfig, target: Target) -> Iterator[str]:
    """A format that the device computes only slowly, or not at all."""
    device, name = target.figures, target.name
    if target.kind != "gpu" or device is None:
        return
    if train.precision == "fp8" and device.fp8 is None:
        yield f"regpt train will refuse this: {name} has no units for fp8; set train.precision to bf16"
    elif getattr(device, train.precision, 1.0) is None:
        better = next((name for name in ("bf16", "fp16", "tf32") if getattr(device, name)), "fp32")
        yield f"{name} has no units for {train.precision}: time is planned for float32; it has {better}"
    if train.compile and device.capability is not None and device.capability < 7.0:
        needs = "torch.compile needs compute capability 7.0"
        yield f"{needs}, {name} has {device.capability}; set train.compile false"


def doubtful_choices(plan: dict[str, Any]) -> Iterator[str]:
    """Values of the finished plan that deserve a second thought."""
    run, memory, disk, time = (plan[name] for name in ("run", "memory", "disk", "time"))
    if not memory["fits"]:
        largest = memory["largest_micro_batch_rows"]
        way_out = f"set train.micro_batch_rows to {largest}" if largest else "use a smaller model or a larger device"
        needed = f"{memory['needed_gib']:.1f} GiB are needed, {memory['available_gib']:.1f} GiB are there"
        yield f"{run['micro_batch_rows']} rows at once will not fit: {needed}; {way_out}"
    epochs, ratio = plan["data"]["epochs"] if plan["data"] else 0, run["tokens_per_parameter"]
    if epochs > GOOD_EPOCHS:
        effect = "almost nothing" if epochs > USELESS_EPOCHS else "less than new data would"
        yield (
            f"the data is read {epochs:.1f} times; beyond {GOOD_EPOCHS} times, repeating brings {effect} "
            "(Muennighoff et al. 2023): use more data, or fewer steps"
        )
    if ratio < FEW_TOKENS_PER_PARAMETER:
        yield (
            f"{ratio:.2g} tokens a parameter: a smaller model would reach a lower loss in this time "
            "(20 are optimal: Hoffmann et al. 2022)"
        )
    if disk["free_gib"] is not None and disk["checkpoints_gib"] > disk["free_gib"]:
        yield (
            f"the checkpoints take {disk['checkpoints_gib']:.1f} GiB and {disk['free_gib']:.1f} GiB are free here; "
            "keep fewer (checkpoint.keep_last) or choose another disk with --out"
        )
    parts = time["parts_ms"]
    if parts.get("waiting for launches", 0.0) > 0.5 * (time["step_ms"] - parts.get("between steps", 0.0)):
        yield (
            "the GPU will mostly wait for the host to launch small kernels; larger micro-batches cost nothing: raise "
            "train.micro_batch_rows"
        )


def doubtful_figures(target: Target, time: StepTime, load: str | None) -> Iterator[str]:
    """Figures that were taken here and may be wrong: under load, or from a small part of a step."""
    if target.here is None or (target.kind == "gpu" and "measured" not in target.how):
        return
    if load:
        yield f"this machine is busy ({load}): the time is doubtful; plan again when it has nothing else to do"
    if time.timed_share is not None and time.timed_share < SMALL_SHARE:
        yield (
            f"the time is extrapolated from {time.timed_share:.1%} of a micro-batch, which takes too long to be timed "
            "here, so it is doubtful; regpt bench train measures steps"
        )
