"""The plan of a run, before it runs: configuration and device in, plain values out (docs/plan.md)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regpt.checkpoint.config import CheckpointConfig
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.data.loader import check_batch
from regpt.data.packed import ConversationRows
from regpt.data.rows import CONVERSATIONS
from regpt.errors import UsageError
from regpt.model.config import GPT2_VOCAB_SIZE
from regpt.runs.build import Corpus
from regpt.runs.plan_stages import GIB, PlannedStage, checkpoint_bytes, planned_stages
from regpt.tools.measure import busy, free_disk_bytes
from regpt.tools.plan.memory import PlannedStep
from regpt.tools.plan.speed import StepTime, Target, planned_target
from regpt.train.config import TrainConfig
from regpt.train.schedule import make_schedule

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: optimal for a given number of FLOPs
FORWARD_SHARE = 0.36  # of a micro-batch's time: its forward alone, as validation runs it (a third of the products)
START_SECONDS = {True: 45.0, False: 10.0}  # compiled or not: imports, building, the first step
GOOD_EPOCHS = 4  # Muennighoff et al. 2023: up to four epochs are nearly as good as new data
USELESS_EPOCHS = 16  # the same: after about sixteen, repeating brings almost nothing
FEW_TOKENS_PER_PARAMETER = 0.5  # a fortieth of what is optimal
ASSUMED = "assumed here; add --data DIR, or --model.vocab-size N (Llama 3 has 128,256)"
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
    assumed = not (corpus or config.model.vocab_size or config.model.family == "gpt2")
    config = config.with_vocab_size(corpus.vocab_size if corpus else GPT2_VOCAB_SIZE)
    load = busy()  # before anything is measured
    target = planned_target(gpu, config.train.device, config.train.precision)
    if target.kind != "gpu" and gpus > 1:
        raise UsageError(f"--gpus is {gpus}, but this is planned for {target.name}; add --gpu NAME")
    stages = list(planned_stages(config, target, gpus, mfu))
    largest = max(stages, key=lambda stage: stage.room.memory(stage.rows).needed)
    run = describe_run(config, stages)
    tokens = run["tokens"]
    plan: dict[str, Any] = {
        "recipe": recipe,
        "machine": describe_target(target, gpus),
        "model": describe_model(stages[0].step),
        "run": run,
        "data": describe_data(corpus, tokens, config.data) if corpus else None,
        "memory": largest.room.describe(largest.rows),
        "disk": disk(config, checkpoint_bytes(largest.step), tokens, target, corpus),
        "time": describe_time(config, target, stages, gpus, corpus),
        "cost": None,
    }
    if price is not None:
        hours = plan["time"]["hours"] * gpus
        plan["cost"] = {"price_per_gpu_hour": price, "gpu_hours": hours, "total": hours * price}
    choices = doubtful_choices(plan, largest.rows)
    warnings = [*refusals(config, gpus, stages), *unsuitable_device(config.train, target), *choices]
    if config.grpo.tasks:
        warnings.insert(0, "the time is that of the updates; the replies that they learn from are written before each")
    if assumed:
        warnings.insert(0, f"the vocabulary is the data's: GPT-2's {GPT2_VOCAB_SIZE:,} tokens are {ASSUMED}")
    return plan | {"warnings": [*warnings, *doubtful_figures(target, stages[0].time, load)]}


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
    sizes |= {"trained_parameters": shape.learned} if shape.adapted else {}
    return sizes | {"flops_per_token": shape.flops_per_token}


def describe_run(config: RunConfig, stages: Sequence[PlannedStage]) -> dict[str, Any]:
    first, tokens = stages[0], sum(stage.steps * stage.batch_tokens for stage in stages)
    return {
        "steps": config.train.steps,
        "batch_tokens": first.batch_tokens,
        "seq_len": first.seq_len,
        "micro_batch_rows": first.rows,
        "accumulation": first.accumulation,
        "precision": config.train.precision,
        "tokens": tokens,
        "tokens_per_parameter": tokens / first.step.shape.parameters,
        "optimal_tokens_per_parameter": TOKENS_PER_PARAMETER,
        "flops": sum(stage.flops for stage in stages),
        "stages": [describe_stage(stage) for stage in stages] if len(stages) > 1 else [],
    }


def describe_stage(stage: PlannedStage) -> dict[str, Any]:
    return {
        "steps": stage.steps,
        "batch_tokens": stage.batch_tokens,
        "seq_len": stage.seq_len,
        "micro_batch_rows": stage.rows,
        "accumulation": stage.accumulation,
        "needed_gib": stage.room.memory(stage.rows).needed / GIB,
        "step_ms": stage.time.seconds * 1e3,
        "hours": stage.steps * stage.time.seconds / 3600,
    }


def describe_data(corpus: Corpus, tokens: int, data: DataConfig) -> dict[str, Any]:
    path, train = " + ".join(str(folder.path) for folder in corpus.folders), corpus.tokens("train")
    val, epochs = corpus.tokens("val"), tokens / max(1, train)
    found = {"path": path, "train_tokens": train, "val_tokens": val, "epochs": epochs}
    if data.order not in CONVERSATIONS:
        return found
    rows = corpus.rows("train", data.order, data.seed, data.seq_len)
    assert isinstance(rows, ConversationRows)
    return found | {"epochs": tokens / data.seq_len / rows.n_rows, "conversations": rows.sentence()}


def disk(config: RunConfig, checkpoint: float, tokens: int, target: Target, corpus: Corpus | None) -> dict[str, Any]:
    """Bytes of the data (one epoch, where none is given) and of the checkpoints when most of them are there."""
    word = 2 if config.model.vocab_size <= 2**16 else 4  # bytes of a token
    data = word * tokens
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


def describe_time(
    config: RunConfig, target: Target, stages: Sequence[PlannedStage], gpus: int, corpus: Corpus | None
) -> dict[str, Any]:
    """Of a step, in the mean of all stages, and of the run with its validations, each a forward over `eval.val_tokens`
    in rows of the first stage, and its starts: each stage compiles anew."""
    train, every, first = config.train, config.eval.every_steps, stages[0]
    there = corpus.tokens("val") if corpus else config.eval.val_tokens
    batches = math.ceil(min(config.eval.val_tokens or there, there) / (first.rows * first.seq_len * gpus))
    validation = (2 + ((train.steps - 1) // every if every else 0)) * batches * FORWARD_SHARE * first.time.micro_batch
    seconds = sum(stage.steps * stage.time.seconds for stage in stages)
    parts: dict[str, float] = {}
    for stage in stages:
        for name, part in stage.time.parts.items():
            parts[name] = parts.get(name, 0.0) + part * stage.steps / train.steps
    return {
        "step_ms": seconds / train.steps * 1e3,
        "parts_ms": {name: part * 1e3 for name, part in parts.items()},
        "tokens_per_s": sum(stage.steps * stage.batch_tokens for stage in stages) / seconds,
        "mfu": sum(stage.flops for stage in stages) / seconds / (target.peak * gpus),
        "validation_hours": validation / 3600,
        "hours": (seconds + validation + len(stages) * START_SECONDS[train.compile]) / 3600,
        "how": first.time.how,
    }


# ---- warnings, one sentence each


def refusals(config: RunConfig, gpus: int, stages: Sequence[PlannedStage]) -> Iterator[str]:
    """Why `regpt train` would not start, or not do what is meant."""
    train, warmup = config.train, config.optim.warmup_steps
    batches = [partial(check_batch, one.seq_len, one.batch_tokens, one.rows, gpus) for one in stages]
    for check in (*batches, lambda: make_schedule(config.optim, train.steps)):
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


def doubtful_choices(plan: dict[str, Any], rows: int) -> Iterator[str]:
    """Values of the finished plan that deserve a second thought; `rows` at once are those of its memory."""
    run, memory, disk, time = (plan[name] for name in ("run", "memory", "disk", "time"))
    if not memory["fits"]:
        largest = memory["largest_micro_batch_rows"]
        way_out = f"set train.micro_batch_rows to {largest}" if largest else "use a smaller model or a larger device"
        needed = f"{memory['needed_gib']:.1f} GiB are needed, {memory['available_gib']:.1f} GiB are there"
        yield f"{rows} rows at once will not fit: {needed}; {way_out}"
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
