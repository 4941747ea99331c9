"""`train.micro_batch_rows = "auto"`: try micro-batches on the device itself, and take the largest comfortable one.

On a GPU that is the largest whose peak leaves a few per cent of the memory free. On a CPU memory is not what is scarce
but cache: there it is the smallest that is as fast, a row, as twice as many.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from regpt.errors import UserError
from regpt.train.backend import LossSum, uncompiled
from regpt.train.capacity import Capacity, SavedTensors, capacity, peak_bytes, start_counting
from regpt.train.memory import free_memory, is_out_of_memory
from regpt.train.micro_batch import LAST_RESORTS
from regpt.train.trainer import Trainer

FASTER = 0.95  # of the time a row: what twice the rows must save on a CPU to be worth its memory
PEAK_OVER_SAVED = 3  # measured on gpt2-tiny: 2.7; backward holds gradients, and the loss copies, next to what was saved
CPU_SECONDS = 20.0  # after which no larger micro-batch is tried: choosing shall not take longer than it saves


@dataclass(frozen=True)
class Probe:
    """One micro-batch that was tried.

    Attributes:
        compiled: with the compiled step, or with the plain one to learn where to begin.
        bytes: the peak, None when it did not fit.
        seconds: of forward and backward.
    """

    rows: int
    compiled: bool
    bytes: int | None
    seconds: float


@dataclass(frozen=True)
class Choice:
    """The choice for all ranks, and the probes of this rank."""

    rows: int
    why: str
    probes: tuple[Probe, ...]

    def facts(self) -> dict[str, object]:
        """Its facts for env.json."""
        return {"chosen": self.rows, "why": self.why, "probes": [asdict(probe) for probe in self.probes]}


def row_choices(batch_rows: int) -> list[int]:
    """Divisors of `batch_rows`, what a process computes in a step: the powers of two, and what is larger than those."""
    powers = batch_rows & -batch_rows  # the largest power of two that divides it
    return [n for n in range(1, batch_rows + 1) if batch_rows % n == 0 and (n & (n - 1) == 0 or n > powers)]


def choose_rows(trainer: Trainer) -> Choice:
    """Micro-batch rows for `trainer`, whose weights, moments and random states stay what they are.

    Every process tries for itself, without a collective; the smallest of their numbers is everybody's.

    Raises:
        UserError: one row does not fit, in one of the processes.
    """
    config, mesh = trainer.config, trainer.mesh
    choices = row_choices(config.batch_tokens // trainer.loader.seq_len // mesh.world_size)
    room = capacity(mesh.device, mesh.world_size)
    prober = Prober(trainer)
    if mesh.device.type == "cpu":
        rows = fastest(choices, prober.on_cpu, room)
        why = "the fastest a row"
    else:
        begin = choices[0]
        if prober.compiled:  # which takes long: begin above what fits the plain step, which keeps more for its backward
            plain = largest(choices, lambda n: prober.on_gpu(n, plain=True), room, begin)
            begin = next((n for n in choices if n > plain), plain)
        rows = largest(choices, prober.on_gpu, room, begin)
        why = "the largest that leaves memory free"
    trainer.backend.clear_gradients()
    free_memory(mesh.device)
    rows = mesh.smallest(rows)
    if not rows:
        raise UserError(
            f"out of memory with one row at a time, tried for train.micro_batch_rows = 'auto'; {LAST_RESORTS}"
        )
    return Choice(rows, why, tuple(prober.done))


def largest(choices: Sequence[int], peak: Callable[[int], int | None], room: Capacity, begin: int) -> int:
    """The largest of `choices` whose peak is within `room`, 0 when none is; `peak(rows)` is None when it does not fit.

    Few are tried: the next one is the largest that the line through the last two peaks lets fit. Before there are two,
    all above what is held beforehand counts as growing with the rows, which is too much rather than too little.
    """
    fits, too_large, rows = 0, math.inf, begin
    points = [(0, room.held)]  # rows, peak
    while True:
        found = peak(rows)
        if found is not None:
            points.append((rows, found))
        if found is not None and found <= room.limit:
            fits = rows
        else:
            too_large = rows
        between = [n for n in choices if fits < n < too_large]
        likely = [n for n in between if expected(points, n) <= room.limit]
        if fits and not likely:
            return fits
        if not between:
            return 0
        rows = likely[-1] if likely else between[0]


def expected(points: Sequence[tuple[int, int]], rows: int) -> float:
    """The peak of `rows`, on the line through the last two points; through the last alone, the same for all."""
    (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else (points[0], (1, points[0][1]))
    return y1 + (y1 - y0) / (x1 - x0) * (rows - x1)


def fastest(choices: Sequence[int], measure: Callable[[int], Probe], room: Capacity) -> int:
    """From one row upwards, the last of `choices` that is faster a row than the one before; 0 when none fits."""
    best, spent = 0, measure(choices[0]).seconds  # which starts threads and makes what is made once: not compared
    previous: Probe | None = None
    for rows in choices:
        if previous is not None:
            expected = (previous.bytes or 0) / previous.rows * rows
            if expected > room.limit or spent > CPU_SECONDS:
                return best
        found = measure(rows)
        spent += found.seconds
        if found.bytes is None:
            return best
        if previous is not None and found.seconds / rows > FASTER * previous.seconds / previous.rows:
            return best
        best, previous = rows, found
    return best


class Prober:
    """Tries micro-batches of the trainer's own data and notes what they took."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.device = trainer, trainer.mesh.device
        plain = uncompiled(trainer.backend.loss_sum)
        self.compiled = plain is not None
        self.plain = plain or trainer.backend.loss_sum
        self.done: list[Probe] = []

    def on_gpu(self, rows: int, plain: bool = False) -> int | None:
        """Peak of forward and backward with gradients, weights and moments in their places; None: it does not fit."""
        loss_sum = self.plain if plain else self.trainer.backend.loss_sum
        started = time.perf_counter()
        try:
            self.forward_and_backward(loss_sum, rows)  # compiles, chooses kernels, makes workspaces
            start_counting(self.device)
            started = time.perf_counter()
            self.forward_and_backward(loss_sum, rows)
            peak = peak_bytes(self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            peak = None
        self.done.append(Probe(rows, self.compiled and not plain, peak, time.perf_counter() - started))
        free_memory(self.device)
        return peak

    def on_cpu(self, rows: int) -> Probe:
        """Bytes that the plain step saves for its backward, and its time."""
        saved = SavedTensors(list(self.trainer.model.parameters()))
        started = time.perf_counter()
        size = None
        try:
            with saved:
                self.forward_and_backward(self.plain, rows)
            size = PEAK_OVER_SAVED * saved.bytes
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.done.append(Probe(rows, False, size, time.perf_counter() - started))
        return self.done[-1]

    def forward_and_backward(self, loss_sum: LossSum, rows: int) -> None:
        """One micro-batch of the first step; returns when the device is done."""
        batch = self.trainer.loader.step(self.trainer.step, rows)[0].to(self.device)
        with self.trainer.backend.context():
            loss = loss_sum(batch)[0]
        loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
