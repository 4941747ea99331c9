"""Milliseconds a step from small pieces of the model, timed on this machine: for CPUs, and for Apple's GPUs.

Two models of few layers run a few micro-batches and updates; their difference is what a layer costs, the rest what the
embedding and the head cost. Where a micro-batch would take long, fewer rows are timed, and time is taken to grow with
them. A few seconds, whatever the size of the run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from regpt.data.batch import Batch
from regpt.kernels.select import ops_of
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import allocate, initialize, without_memory
from regpt.tools.plan.shape import shape_of
from regpt.tools.plan.speed import Speed
from regpt.train.config import OptimConfig, PrecisionName, TrainConfig
from regpt.train.loss import make_loss_sum
from regpt.train.optim import make_optimizer
from regpt.train.peak import synchronize
from regpt.train.precision import parameter_dtype
from regpt.train.recompute import recompute_blocks

PIECE_SECONDS = 0.25  # longest time expected of one timed micro-batch
EXPECTED_SHARE = 0.4  # of the measured product, reached by a micro-batch: for choosing its size only

REPEATS = 5
FEW, MORE = 1, 3  # layers


@dataclass(frozen=True)
class Piece:
    """Seconds of a model with few layers: of one micro-batch, of one update (clipping, optimizer)."""

    layers: int
    micro_batch: float
    update: float


def calibrated_speed(
    model: ModelConfig,
    train: TrainConfig,
    optim: OptimConfig,
    *,
    seq_len: int,
    rows: int,
    micro_batches: int,
    device: torch.device,
    peak: float,
) -> Speed:
    """A step of `micro_batches` of `rows`, uncompiled, on `device`, whose products reach `peak` FLOP/s."""
    timed_rows, timed_len = sizes(model, train, seq_len, rows, peak)
    counts = sorted({min(FEW, model.n_layer), min(MORE, model.n_layer)})
    cases = [Case(replace(model, n_layer=layers), train, optim, timed_rows, timed_len, device) for layers in counts]
    pieces = time_pieces(cases)
    scale = rows * seq_len / (timed_rows * timed_len)
    micro = extrapolate(pieces, model.n_layer, lambda piece: piece.micro_batch) * scale
    update = extrapolate(pieces, model.n_layer, lambda piece: piece.update)
    what = f"{' and '.join(map(str, counts))} of {model.n_layer} layers, {timed_rows} × {timed_len} tokens"
    parts = {"forward and backward": micro * micro_batches, "optimizer": update}
    return Speed(parts, micro, f"timed here: {what}", timed_share=1 / scale)


def sizes(model: ModelConfig, train: TrainConfig, seq_len: int, rows: int, peak: float) -> tuple[int, int]:
    """Rows and their length that take about PIECE_SECONDS in the larger of the two models."""
    largest = shape_of(replace(model, n_layer=min(MORE, model.n_layer)), seq_len, pad_vocab=train.pad_vocab)
    tokens = PIECE_SECONDS * EXPECTED_SHARE * peak / largest.flops_per_token
    if tokens >= seq_len:
        return max(1, min(rows, int(tokens // seq_len))), seq_len
    return 1, max(1, min(seq_len, int(tokens)))


class Case:
    """A small model, ready to run: `micro_batch` and `update` do what a training step does."""

    def __init__(
        self, model: ModelConfig, train: TrainConfig, optim: OptimConfig, rows: int, seq_len: int, device: torch.device
    ):
        self.layers, self.device = model.n_layer, device
        ops = ops_of(train.precision, device)
        with without_memory():
            empty = Transformer(model, ops, pad_vocab=train.pad_vocab)
        self.model = initialize(allocate(empty, device, parameter_dtype(train.precision)), seed=0)
        self.optimizer = make_optimizer(self.model, optim, device)
        if train.activation_checkpointing:
            recompute_blocks(self.model)
        precision: PrecisionName = train.precision
        self.loss_sum = make_loss_sum(self.model, precision, device, False)
        tokens = torch.arange(rows * (seq_len + 1), device=device).view(rows, seq_len + 1) % model.vocab_size
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def micro_batch(self) -> None:
        (self.loss_sum(self.batch) / self.batch.idx.numel()).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def time_pieces(cases: list[Case]) -> list[Piece]:
    """The median of some repetitions of each; in turn, so that what slows the machine down slows all of them."""
    times: dict[int, tuple[list[float], list[float]]] = {case.layers: ([], []) for case in cases}
    for case in cases:  # the first of each allocates
        case.micro_batch()
        case.update()
    for _ in range(REPEATS):
        for case in cases:
            times[case.layers][0].append(seconds(case.micro_batch, case.device))
            times[case.layers][1].append(seconds(case.update, case.device))
    return [Piece(layers, median(micro), median(update)) for layers, (micro, update) in times.items()]


def seconds(function: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def extrapolate(pieces: list[Piece], layers: int, of: Callable[[Piece], float]) -> float:
    """Seconds of `layers` layers from those of few: a line through them; noise never makes a layer cost less than
    nothing."""
    few, more = pieces[0], pieces[-1]
    if few.layers == more.layers:
        return of(few) * layers / few.layers
    each = max(0.0, of(more) - of(few)) / (more.layers - few.layers)
    return of(more) + each * (layers - more.layers)
