"""Milliseconds a step from the figures of a device and the coefficients of a path."""

from dataclasses import dataclass

from regpt.errors import UsageError
from regpt.tools.plan.coefficients import (
    ATTENTION_HALF_LENGTH,
    HOST_BYTES_PER_SECOND,
    LAUNCH_SECONDS,
    LINK_SHARE,
    OPTIMIZER_TRAFFIC,
    RECOMPUTE_SHARE,
    STEP_SECONDS,
    Path,
    path_of,
)
from regpt.tools.plan.memory import Settings
from regpt.tools.plan.shape import Shape
from regpt.train.devices import Device

PCIE_5_CAPABILITY = 9.0  # Hopper


@dataclass(frozen=True)
class Speed:
    """Of one step.

    Attributes:
        parts: name → seconds; their sum is `seconds`.
        micro_batch: seconds of one micro-batch, which are in `parts`.
        how: where it is from.
        timed_share: of a micro-batch's tokens, that were timed; None where nothing was.
    """

    parts: dict[str, float]
    micro_batch: float
    how: str
    timed_share: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def product_rate(device: Device, precision: str) -> float:
    """FLOP/s of matrix products in `precision` on the data sheet; bfloat16 without units for it is computed in float32.

    Raises:
        UsageError: no figure for this precision.
    """
    if precision == "fp64":
        raise UsageError("no time can be planned for train.precision fp64, which is for tests; use fp32")
    rate = {name: getattr(device, name) for name in ("fp32", "tf32", "bf16", "fp16", "fp8")}[precision]
    return (rate or device.fp32) * 1e12


def gpu_speed(shape: Shape, rows: int, micro_batches: int, gpus: int, device: Device, settings: Settings) -> Speed:
    """A step of `micro_batches` of `rows` on each of `gpus` devices."""
    path, fp8 = path_of(settings.path, settings.precision), settings.precision == "fp8" and device.fp8 is not None
    rate = product_rate(device, "bf16" if settings.precision == "fp8" else settings.precision)
    bandwidth = device.bandwidth * 1e9
    N = rows * shape.seq_len
    head = N * 6 * shape.vocab_rows * shape.n_embd / (rate * path.product_share)
    reached = product_rate(device, "fp8") * path.fp8_share if fp8 else rate * path.product_share
    in_blocks = N * shape.block_flops / reached
    micro = {
        "products": in_blocks + head,
        "attention": N * shape.attention_flops / (rate * attention_share(path, shape.seq_len)),
        "logits": path.logits_traffic * N * shape.vocab_rows / bandwidth,
        "norms, residuals, GELU": path.traffic * N * shape.n_layer * shape.n_embd / bandwidth,
        "weights": path.weight_traffic * shape.padded / bandwidth,
    }
    if fp8:
        micro["casts to FP8"] = path.casts * N * shape.n_layer * shape.n_embd / bandwidth
    if settings.checkpointing:
        again = in_blocks + micro["attention"] + micro["norms, residuals, GELU"]
        micro["blocks again"] = RECOMPUTE_SHARE * again
    floor = path.launches * shape.n_layer * LAUNCH_SECONDS
    micro["waiting for launches"] = max(0.0, floor - sum(micro.values()))
    parts = {name: seconds * micro_batches for name, seconds in micro.items()}
    parts["optimizer"] = OPTIMIZER_TRAFFIC * shape.padded / bandwidth
    if settings.offload:  # moments come and go at the same time
        newer = (device.capability or 0.0) >= PCIE_5_CAPABILITY
        parts["moments from and to the host"] = 8 * shape.padded / HOST_BYTES_PER_SECOND[newer]
    parts["between steps"] = STEP_SECONDS
    if gpus > 1:
        parts["sum over GPUs"] = all_reduce(4 * shape.padded, gpus, device)
    return Speed(parts, sum(micro.values()), f"figures of the {device.name} and {path.origin}")


def attention_share(path: Path, seq_len: int) -> float:
    """Of the peak, for rows of this length."""
    return path.attention_share * seq_len / (seq_len + ATTENTION_HALF_LENGTH)


def all_reduce(n_bytes: float, gpus: int, device: Device) -> float:
    """Seconds of one sum over the GPUs of a host: each sends and receives 2·(n - 1)/n of the bytes (Patarasuk & Yuan
    2009)."""
    return 2 * (gpus - 1) / gpus * n_bytes / ((device.link or 16) * 1e9 * LINK_SHARE)


def speed_at(mfu: float, flops: float, micro_batches: int, peak: float) -> Speed:
    """A step of `flops` a device at an MFU that the user states."""
    seconds = flops / (mfu * peak)
    return Speed({"at the stated MFU": seconds}, seconds / micro_batches, f"stated: MFU {mfu:.1%}")
