"""Milliseconds a step from small pieces of the model, timed on this machine: for CPUs, and for Apple's GPUs.

Two models of few layers run a few micro-batches and updates; their difference is the cost of a layer, the rest that of
the embedding and the head. Where a micro-batch would take long, fewer rows are timed, and time is taken to grow with
them. A few seconds, whatever the size of the run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch

from regpt.data.batch import Batch
from regpt.kernels.select import ops_of
from regpt.model.transformer import Transformer
from regpt.model.weights import allocate, initialize, without_memory
from regpt.tools.plan.memory import PlannedStep
from regpt.tools.plan.speed import StepTime
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig
from regpt.train.optim import make_optimizer
from regpt.train.peak import synchronize
from regpt.train.precision import parameter_dtype
from regpt.train.recompute import recompute_blocks

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
            empty = Transformer(step.model, ops_of(step.precision, device), pad_vocab=step.pad_vocab)
        self.model = initialize(allocate(empty, device, parameter_dtype(step.precision)), seed=0)
        self.optimizer = make_optimizer(self.model, optim, device)
        if step.checkpointing:
            recompute_blocks(self.model)
        self.loss_sum = make_loss_sum(self.model, step.precision, device, False)
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
