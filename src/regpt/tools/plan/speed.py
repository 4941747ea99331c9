"""The device that a run is planned for, and milliseconds a step on it.

On a GPU: FLOPs and bytes counted on the model over the figures of the device that a path reaches. To set a path's
numbers after a measurement on another GPU or with other kernels, take the profile of `regpt bench train`;
`python benchmarks/plan.py` prints planned and measured figures next to each other.

On a CPU, Apple's GPU or a GPU without a data sheet: two models of few layers run a few micro-batches and updates here;
their difference is the cost of a layer, the rest that of the embedding and the head. Where a micro-batch would take
long, fewer rows are timed, and time is taken to grow with them. A few seconds, whatever the size of the run.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from regpt.console.text import counted
from regpt.data.batch import Batch
from regpt.errors import UsageError
from regpt.kernels.select import ops_of
from regpt.model.adapters import adapt, begin_adapters
from regpt.model.config import FAMILIES
from regpt.model.families import make_model
from regpt.model.weights import allocate, initialize, without_memory
from regpt.parallel.mesh import choose_device
from regpt.tools.measure import memory_bytes
from regpt.tools.plan.memory import PlannedStep, chunk_of
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig, PrecisionName
from regpt.train.devices import Device, device_by_name
from regpt.train.optim import make_optimizer
from regpt.train.peak import device_figures, device_peak, driver_name, synchronize
from regpt.train.precision import HALF_TYPES, parameter_dtype
from regpt.train.recompute import recompute_blocks

# ---- the device


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        name: of the device.
        kind: gpu, cpu or mps.
        figures: of a GPU with a data sheet.
        here: the device itself where it is part of this machine.
        memory: bytes that it has.
        peak: FLOP/s of which MFU is a share.
        how: where the figures are from.
    """

    name: str
    kind: str
    figures: Device | None
    here: torch.device | None
    memory: float
    peak: float
    how: str


def planned_target(typed: str, device: str, precision: PrecisionName) -> Target:
    """The device that `--gpu` names, or with an empty name this machine's `device` (auto, cuda, mps, cpu).

    Raises:
        UsageError: a GPU that the table does not have, or a device that this machine does not have.
    """
    here, figures = None, None
    if typed and typed.lower() != "cpu":
        figures = device_by_name(typed)
        if torch.cuda.is_available() and device_figures(torch.device("cuda")) == figures:
            here = torch.device("cuda")
    else:
        here = choose_device(typed.lower() or device)
        figures = device_figures(here) if here.type == "cuda" else None
    if figures is not None:
        memory = memory_bytes(here) if here else figures.memory_gib * 2**30
        how = f"data sheet: {figures.source}"
        return Target(figures.name, "gpu", figures, here, memory, figures.peak(precision), how)
    assert here is not None
    peak = device_peak(here, precision)
    name = f"CPU with {counted(torch.get_num_threads(), 'thread')}" if here.type == "cpu" else driver_name(here)
    kind = "gpu" if here.type == "cuda" else here.type
    return Target(name, kind, device_figures(here), here, memory_bytes(here), peak.flops, peak.how)


# ---- time from figures


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
# Traffic of families with gates and RMSNorm, compiled, where float32 weights are cast and the residual stream is
# float32: fitted to llama-124m and llama3-1b in rows of 4,096 on an H200. With bfloat16 weights a share of it: fitted
# to llama3-8b there. Products of their fused path, whose traffic is counted, reach more of the peak than GPT-2's: wider
# layers, fewer epilogues; fitted likewise.
GATED_TRAFFIC, NARROW_SHARE = 240, 0.9
GATED_FUSED_PRODUCTS = 0.7
# Attention reaches this share of the same peak in long rows, T/(T + 826) of it in rows of T: what causality masks is
# skipped in blocks. Its FLOPs have no discount. 40 % at T = 1024, 51.5 % at 2048, fused, on an H100.
ATTENTION_SHARE, ATTENTION_HALF_LENGTH = 0.723, 826
WEIGHT_TRAFFIC = 20  # bytes per parameter and micro-batch: copies made, gradients cast and added; 16 to 30 in profiles
OPTIMIZER_SHARE = 0.9  # of the bandwidth, by norm, clipping and update: 40 bytes a parameter in float32
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
    parts["optimizer"] = optimizer_bytes(step) / (device.bandwidth * 1e9 * OPTIMIZER_SHARE)
    if step.offload:  # moments come and go at the same time
        newer = (device.capability or 0.0) >= PCIE_5_CAPABILITY
        parts["moments from and to the host"] = step.moment_bytes / HOST_BYTES_PER_SECOND[newer]
    parts["between steps"] = STEP_SECONDS
    if gpus > 1:  # each sends and receives 2·(n - 1)/n of the gradients' bytes (Patarasuk & Yuan 2009)
        n_bytes = 2 * (gpus - 1) / gpus * step.gradient_bytes * step.shape.learned
        parts["sum over GPUs"] = n_bytes / ((device.link or 16) * 1e9 * LINK_SHARE)
    measured = "estimated" if step.path == "eager" or step.precision not in HALF_TYPES else "measured on an H100 SXM"
    return StepTime(parts, sum(micro.values()), f"figures of the {device.name}; shares of them {measured}, {step.path}")


def optimizer_bytes(step: PlannedStep) -> float:
    """Bytes read and written by an update: gradients by the norm, twice by clipping, and by the update, which reads and
    writes weights and moments."""
    weight_bytes = 4 if step.shape.adapted else step.weight_bytes
    return (4 * step.gradient_bytes + 2 * weight_bytes) * step.shape.learned + 2 * step.moment_bytes


def micro_batch_time(step: PlannedStep, rows: int, device: Device) -> dict[str, float]:
    """Seconds of one micro-batch by part."""
    shape, reached, bandwidth = step.shape, reached_by(step), device.bandwidth * 1e9
    fp8 = step.precision == "fp8" and device.fp8 is not None
    rate = product_rate(device, "bf16" if step.precision == "fp8" else step.precision)
    wide = 1 if step.precision in HALF_TYPES else 2
    N = rows * step.seq_len
    chunk = chunk_of(step, rows)  # whose product is added to the gradient of the head's weight, in float32
    head_sums = math.ceil(N / chunk) * 8 * shape.vocab_rows * shape.n_embd if chunk else 0
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
        "logits": (wide * reached.logits * N * shape.vocab_rows + head_sums) / bandwidth,
        "weights": WEIGHT_TRAFFIC * shape.padded / bandwidth,
    }
    if fp8:
        micro["casts to FP8"] = reached.fp8_casts * N * shape.n_layer * shape.n_embd / bandwidth
    if step.checkpointing:
        micro["blocks again"] = RECOMPUTED_SHARE * sum(blocks.values())
    micro["waiting for launches"] = max(0.0, reached.launches * shape.n_layer * LAUNCH_SECONDS - sum(micro.values()))
    return micro


def reached_by(step: PlannedStep) -> Reached:
    """`REACHED` of the path, for the model's family."""
    reached, shape = REACHED[step.path], step.model.resolved()
    if step.path == "eager" or not FAMILIES[shape.family].gated:
        return reached
    if step.path == "fused":  # what the kernels between the products read and write (kernels/llama.py)
        rotated = (shape.n_head + shape.n_kv_head) * shape.head_size
        traffic = 24 + (8 * rotated + 16 * shape.n_inner) / shape.n_embd
        return replace(reached, traffic=traffic, products=GATED_FUSED_PRODUCTS)
    return replace(reached, traffic=NARROW_SHARE * GATED_TRAFFIC if step.weights == "bf16" else GATED_TRAFFIC)


def stated_time(mfu: float, flops: float, micro_batches: int, peak: float) -> StepTime:
    """A step of `flops` a device at an MFU that the user states."""
    seconds = flops / (mfu * peak)
    return StepTime({"at the stated MFU": seconds}, seconds / micro_batches, f"stated: MFU {mfu:.1%}")


# ---- time from small pieces, measured here


PIECE_SECONDS = 0.25  # longest time expected of one timed micro-batch
EXPECTED_SHARE = 0.4  # of the measured product, reached by a micro-batch: for choosing its size only
REPEATS = 5
FEW, MORE = 1, 3  # layers


def calibrated_time(
    step: PlannedStep, optim: OptimConfig, *, rows: int, micro_batches: int, device: torch.device, peak: float
) -> StepTime:
    """A step of `micro_batches` of `rows`, uncompiled, on `device`, whose products reach `peak` FLOP/s."""
    layers = sorted({min(FEW, step.model.n_layer), min(MORE, step.model.n_layer)})
    steps = [replace(step, model=replace(step.model, n_layer=n)) for n in layers]
    timed_rows, timed_len = sizes(steps[-1], rows, peak)
    times = time_pieces([SmallStep(small, optim, timed_rows, timed_len, device) for small in steps])
    micro, update = (extrapolate(layers, seconds, step.model.n_layer) for seconds in zip(*times))
    scale = rows * step.seq_len / (timed_rows * timed_len)
    how = f"{' and '.join(map(str, layers))} of {step.model.n_layer} layers, {timed_rows} × {timed_len} tokens"
    parts = {"forward and backward": micro * scale * micro_batches, "optimizer": update}
    return StepTime(parts, micro * scale, f"timed here: {how}", timed_share=1 / scale)


def sizes(largest: PlannedStep, rows: int, peak: float) -> tuple[int, int]:
    """Rows and their length that take about PIECE_SECONDS in the larger of the two models."""
    tokens = int(PIECE_SECONDS * EXPECTED_SHARE * peak / largest.shape.flops_per_token)
    if tokens >= largest.seq_len:
        return max(1, min(rows, tokens // largest.seq_len)), largest.seq_len
    return 1, max(1, tokens)


class SmallStep:
    """A small model, ready to run; `micro_batch` and `update` are the parts of a training step."""

    def __init__(self, step: PlannedStep, optim: OptimConfig, rows: int, seq_len: int, device: torch.device):
        self.device = device
        with without_memory():
            empty = make_model(step.model, ops_of(step.precision, device), pad_vocab=step.pad_vocab)
            empty = adapt(empty, step.adapter)
        self.model = initialize(allocate(empty, device, parameter_dtype(step.precision, step.weights)), seed=0)
        begin_adapters(self.model, seed=0)
        self.optimizer = make_optimizer(self.model, optim, device)
        if step.checkpointing:
            recompute_blocks(self.model)
        self.loss_sum = make_loss_sum(self.model, "fp32" if step.weights == "bf16" else step.precision, device, False)
        tokens = torch.arange(rows * (seq_len + 1), device=device).view(rows, seq_len + 1) % step.model.vocab_size
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def micro_batch(self) -> None:
        (self.loss_sum(self.batch) / self.batch.idx.numel()).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def time_pieces(steps: Sequence[SmallStep]) -> list[tuple[float, float]]:
    """Seconds of a micro-batch and of an update of each: the median, after one that allocates.

    In turn, so that what slows the machine down slows all of them.
    """
    runs = [
        [(seconds(small.micro_batch, small.device), seconds(small.update, small.device)) for small in steps]
        for _ in range(1 + REPEATS)
    ]
    return [(median(micro for micro, _ in own), median(update for _, update in own)) for own in zip(*runs[1:])]


def seconds(function: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def extrapolate(layers: Sequence[int], times: Sequence[float], wanted: int) -> float:
    """Seconds of `wanted` layers on the line through those of few; noise never makes more layers cheaper."""
    each = max(0.0, times[-1] - times[0]) / max(1, layers[-1] - layers[0])
    return times[-1] + each * (wanted - layers[-1])
