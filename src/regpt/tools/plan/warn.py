"""What deserves a second thought before a run is started, one sentence each."""

from collections.abc import Callable, Iterator
from typing import Any

from regpt.data.config import DataConfig
from regpt.data.loader import check_batch
from regpt.errors import UsageError
from regpt.tools.plan.speed import StepTime
from regpt.tools.plan.target import Target
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.schedule import make_schedule

GOOD_EPOCHS = 4  # Muennighoff et al. 2023: up to four epochs are nearly as good as new data
USELESS_EPOCHS = 16  # the same: after about sixteen, repeating brings almost nothing
FEW_TOKENS_PER_PARAMETER = 0.5  # a fortieth of what is optimal
HALF = 0.5
SMALL_SHARE = 0.25  # of a micro-batch: smaller products reach less of the peak


def refusals(data: DataConfig, train: TrainConfig, optim: OptimConfig, gpus: int, rows: int) -> Iterator[str]:
    """Why `regpt train` would not start, or not do what is meant."""
    yield from said_by(lambda: check_batch(data.seq_len, train.batch_tokens, rows, gpus))
    yield from said_by(lambda: make_schedule(optim, train.steps))
    if optim.warmup_steps >= train.steps:
        length = f"the warmup of {optim.warmup_steps:,} steps is as long as the run ({train.steps:,})"
        yield f"{length}: shorten optim.warmup_steps"


def said_by(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except UsageError as error:
        yield f"regpt train will refuse this: {error}"


def of_precision(train: TrainConfig, target: Target) -> Iterator[str]:
    """A format that the device computes only slowly, or not at all."""
    device = target.figures
    if target.kind != "gpu" or device is None:
        return
    if train.precision == "fp8":
        if device.fp8 is None:
            yield f"regpt train will refuse this: {target.name} has no units for fp8; set train.precision to bf16"
    elif getattr(device, train.precision, 1.0) is None:
        better = next((name for name in ("bf16", "fp16", "tf32") if getattr(device, name)), "fp32")
        yield f"{target.name} has no units for {train.precision}: time is planned for float32; it has {better}"
    if train.compile and device.capability is not None and device.capability < 7.0:
        has = f"{target.name} has {device.capability}"
        yield f"torch.compile needs compute capability 7.0, {has}; set train.compile false"


def of_figures(target: Target, time: StepTime, load: str | None) -> Iterator[str]:
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


def of_memory(memory: dict[str, Any], rows: int) -> Iterator[str]:
    available, largest = memory["available_gib"], memory["largest_micro_batch_rows"]
    if not memory["fits"]:
        way_out = f"set train.micro_batch_rows to {largest}" if largest else "use a smaller model or a larger device"
        yield (
            f"{rows} rows at once will not fit: {memory['needed_gib']:.1f} GiB are needed, {available:.1f} GiB are "
            f"there; {way_out}"
        )


def of_data(data: dict[str, Any] | None, tokens: int, parameters: int) -> Iterator[str]:
    if data is not None and data["epochs"] > GOOD_EPOCHS:
        effect = "almost nothing" if data["epochs"] > USELESS_EPOCHS else "less than new data would"
        yield (
            f"the data is read {data['epochs']:.1f} times; beyond {GOOD_EPOCHS} times, repeating brings {effect} "
            "(Muennighoff et al. 2023): use more data, or fewer steps"
        )
    if tokens / parameters < FEW_TOKENS_PER_PARAMETER:
        yield (
            f"{tokens / parameters:.2g} tokens a parameter: a smaller model would reach a lower loss in this time "
            "(20 are optimal: Hoffmann et al. 2022)"
        )


def of_disk(disk: dict[str, Any]) -> Iterator[str]:
    free = disk["free_gib"]
    if free is not None and disk["checkpoints_gib"] > free:
        yield (
            f"the checkpoints take {disk['checkpoints_gib']:.1f} GiB and {free:.1f} GiB are free here; keep fewer "
            "(checkpoint.keep_last) or choose another disk with --out"
        )


def of_time(time: dict[str, Any]) -> Iterator[str]:
    parts = time["parts_ms"]
    waiting = parts.get("waiting for launches", 0.0)
    if waiting > HALF * (time["step_ms"] - parts.get("between steps", 0.0)):
        yield (
            "the GPU will mostly wait for the host to launch small kernels; larger micro-batches cost nothing: raise "
            "train.micro_batch_rows"
        )
