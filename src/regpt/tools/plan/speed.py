"""Milliseconds a step: FLOPs and bytes counted on the model over the figures of a device that a path reaches.

To set a path's numbers after a measurement on another GPU or with other kernels, take the profile of
`regpt bench train`; `python benchmarks/plan.py` prints planned and measured figures next to each other.
"""

from dataclasses import dataclass

from regpt.errors import UsageError
from regpt.tools.plan.memory import PlannedStep
from regpt.train.devices import Device
from regpt.train.precision import HALF_TYPES


@dataclass(frozen=True)
class Reached:
    """How far a path gets on a GPU.

    Attributes:
        products: share of the peak that bfloat16 products reach; `fp8_products`, those of the blocks in FP8.
        traffic: bytes at the full bandwidth of the data sheet per token, layer and channel, by norms, residuals, GELU,
            casts, bias gradients in bfloat16; twice as much in float32. `fp8_casts`: more of them in FP8.
        logits: likewise, per token and row of the head.
        launches: kernels a layer, forward and backward; a micro-batch takes at least LAUNCH_SECONDS for each.
    """

    products: float
    traffic: float
    logits: float
    fp8_products: float
    fp8_casts: float
    launches: int


# Fitted to steps on one H100 SXM (benchmarks/results/train-*.json). Errors (tests/tools/test_plan_measured.py): fused
# in bfloat16 (124M, 350M, 1558M, rows of 2048) -2 to +4 %, in FP8 2 %; compiled in bfloat16 1 %, in FP8 2 %, with
# activation checkpointing +8 %, float16 on an H200 -7 %. Eager and float32: reckoned from the operations, not measured.
REACHED = {
    "fused": Reached(products=0.63, traffic=47.5, logits=6, fp8_products=0.473, fp8_casts=21, launches=30),
    "compiled": Reached(products=0.698, traffic=180, logits=11.1, fp8_products=0.598, fp8_casts=137, launches=40),
    "eager": Reached(products=0.698, traffic=260, logits=40, fp8_products=0.698, fp8_casts=112, launches=110),
}
# Attention reaches this share of the same peak in long rows, T/(T + 826) of it in rows of T: what causality masks is
# skipped in blocks. Its FLOPs have no discount. 40 % at T = 1024, 51.5 % at 2048, fused, on an H100.
ATTENTION_SHARE, ATTENTION_HALF_LENGTH = 0.723, 826
WEIGHT_TRAFFIC = 20  # bytes per parameter and micro-batch: copies made, gradients cast and added; 16 to 30 in profiles
OPTIMIZER_TRAFFIC = 44  # per parameter and step: fused AdamW reads 16, writes 12; norm and clipping 12; 90 % of peak
STEP_SECONDS = 0.010  # a step: the host reads the loss and starts the next one; as above
# Typical or assumed, not measured here:
LAUNCH_SECONDS = 6e-6  # for PyTorch to launch a kernel: the floor of small models
HOST_BYTES_PER_SECOND = {True: 50e9, False: 25e9}  # between host and GPU: PCIe 5 (Hopper on), PCIe 4
PCIE_5_CAPABILITY = 9.0
LINK_SHARE = 0.6  # of a link's rate, by an all-reduce in buckets
RECOMPUTED_SHARE = 1 / 3  # of a block's forward and backward: its forward, once more


@dataclass(frozen=True)
class StepTime:
    """Time of one step.

    Attributes:
        parts: name → seconds; their sum is `seconds`.
        micro_batch: seconds of one micro-batch, which are in `parts`.
        how: source of the figures.
        timed_share: of a micro-batch's tokens that were timed; None where nothing was.
    """

    parts: dict[str, float]
    micro_batch: float
    how: str
    timed_share: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def product_rate(device: Device, precision: str) -> float:
    """FLOP/s of matrix products in `precision` on the data sheet; of float32 where `device` has no units for it.

    Raises:
        UsageError: no figure for this precision.
    """
    if precision == "fp64":
        raise UsageError("no time can be planned for train.precision fp64, which is for tests; use fp32")
    return (getattr(device, precision) or device.fp32) * 1e12


def gpu_time(step: PlannedStep, rows: int, micro_batches: int, gpus: int, device: Device) -> StepTime:
    """A step of `micro_batches` of `rows` on each of `gpus` devices."""
    micro = micro_batch_time(step, rows, device)
    parts = {name: seconds * micro_batches for name, seconds in micro.items()}
    parts["optimizer"] = OPTIMIZER_TRAFFIC * step.shape.padded / (device.bandwidth * 1e9)
    if step.offload:  # moments come and go at the same time
        newer = (device.capability or 0.0) >= PCIE_5_CAPABILITY
        parts["moments from and to the host"] = 8 * step.shape.padded / HOST_BYTES_PER_SECOND[newer]
    parts["between steps"] = STEP_SECONDS
    if gpus > 1:  # each sends and receives 2·(n - 1)/n of the gradients' bytes (Patarasuk & Yuan 2009)
        n_bytes = 2 * (gpus - 1) / gpus * 4 * step.shape.padded
        parts["sum over GPUs"] = n_bytes / ((device.link or 16) * 1e9 * LINK_SHARE)
    measured = "estimated" if step.path == "eager" or step.precision not in HALF_TYPES else "measured on an H100 SXM"
    return StepTime(parts, sum(micro.values()), f"figures of the {device.name}; shares of them {measured}, {step.path}")


def micro_batch_time(step: PlannedStep, rows: int, device: Device) -> dict[str, float]:
    """Seconds of one micro-batch by part."""
    shape, reached, bandwidth = step.shape, REACHED[step.path], device.bandwidth * 1e9
    fp8 = step.precision == "fp8" and device.fp8 is not None
    rate = product_rate(device, "bf16" if step.precision == "fp8" else step.precision)
    wide = 1 if step.precision in HALF_TYPES else 2
    N = rows * step.seq_len
    head = N * (shape.product_flops - shape.block_flops) / (rate * reached.products)
    blocks_rate = product_rate(device, "fp8") * reached.fp8_products if fp8 else rate * reached.products
    attention_rate = rate * ATTENTION_SHARE * step.seq_len / (step.seq_len + ATTENTION_HALF_LENGTH)
    blocks = {
        "products": N * shape.block_flops / blocks_rate,
        "attention": N * shape.attention_flops / attention_rate,
        "norms, residuals, GELU": wide * reached.traffic * N * shape.n_layer * shape.n_embd / bandwidth,
    }
    micro = blocks | {
        "products": blocks["products"] + head,
        "logits": wide * reached.logits * N * shape.vocab_rows / bandwidth,
        "weights": WEIGHT_TRAFFIC * shape.padded / bandwidth,
    }
    if fp8:
        micro["casts to FP8"] = reached.fp8_casts * N * shape.n_layer * shape.n_embd / bandwidth
    if step.checkpointing:
        micro["blocks again"] = RECOMPUTED_SHARE * sum(blocks.values())
    micro["waiting for launches"] = max(0.0, reached.launches * shape.n_layer * LAUNCH_SECONDS - sum(micro.values()))
    return micro


def stated_time(mfu: float, flops: float, micro_batches: int, peak: float) -> StepTime:
    """A step of `flops` a device at an MFU that the user states."""
    seconds = flops / (mfu * peak)
    return StepTime({"at the stated MFU": seconds}, seconds / micro_batches, f"stated: MFU {mfu:.1%}")
