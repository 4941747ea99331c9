"""`train.micro_batch_rows = "auto"`: try micro-batches on the device itself, and take the largest comfortable one.

On a GPU that is the largest whose peak leaves a few per cent of the memory free. On a CPU cache is scarcer than memory:
there it is the smallest that is as fast, a row, as twice as many.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from regpt.errors import UserError
from regpt.train.memory import Capacity, capacity, free_memory, is_out_of_memory, peak_bytes, start_counting
from regpt.train.micro_batch import LAST_RESORTS
from regpt.train.peak import synchronize
from regpt.train.precision import autocast
from regpt.train.trainer import Trainer

FASTER = 0.95  # of the time a row: what twice the rows must save on a CPU to be worth its memory
CPU_SECONDS = 20.0  # after which no larger micro-batch is tried: choosing shall not take longer than it saves


@dataclass(frozen=True)
class Probe:
    """One micro-batch that was tried.

    Attributes:
        bytes: the peak, None when it did not fit.
        seconds: of forward and backward.
    """

    rows: int
    bytes: int | None
    seconds: float


@dataclass(frozen=True)
class Choice:
    """Rows for all ranks, and the probes of this rank; kept in env.json."""

    chosen: int
    why: str
    probes: list[Probe]


def row_choices(batch_rows: int) -> list[int]:
    """Divisors of `batch_rows`, the rows of a process in a step: the powers of two, and the larger divisors."""
    powers = batch_rows & -batch_rows  # the largest power of two that divides it
    return [n for n in range(1, batch_rows + 1) if batch_rows % n == 0 and (n & (n - 1) == 0 or n > powers)]


def choose_rows(trainer: Trainer) -> Choice:
    """Micro-batch rows for `trainer`, whose weights, moments and random states stay as they are.

    Every process tries for itself, without a collective; all take the smallest of their numbers.

    Raises:
        UserError: one row does not fit, in one of the processes.
    """
    mesh = trainer.mesh
    choices = row_choices(trainer.config.batch_tokens // trainer.loader.seq_len // mesh.world_size)
    room = capacity(mesh.device, mesh.world_size)
    prober = Prober(trainer)
    if mesh.device.type == "cpu":
        rows, why = fastest(choices, prober, room), "the fastest a row"
    else:
        rows, why = largest(choices, prober, room), "the largest that leaves memory free"
    rows = mesh.smallest(rows)
    if not rows:
        raise UserError(
            f"out of memory with one row at a time, tried for train.micro_batch_rows = 'auto'; {LAST_RESORTS}"
        )
    return Choice(rows, why, prober.done)


def largest(choices: Sequence[int], measure: Callable[[int], Probe], room: Capacity) -> int:
    """The largest of `choices` whose peak is within `room`, 0 when none is.

    Few are tried: the next one is the largest that the line through the last two peaks lets fit. Before there are two,
    all above what is held beforehand counts as growing with the rows, which is too much rather than too little.
    """
    fits, too_large, rows = 0, math.inf, choices[0]
    points = [(0, room.held)]  # rows, peak
    while True:
        found = measure(rows).bytes
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


def fastest(choices: Sequence[int], measure: Callable[[int], Probe], room: Capacity) -> int:
    """From one row upwards, the last of `choices` that is faster a row than the one before; 0 when none fits."""
    best, spent = 0, measure(choices[0]).seconds  # which starts threads and makes what is made once: not compared
    points, previous = [(0, room.held)], math.inf  # seconds a row
    for rows in choices:
        if best and (expected(points, rows) > room.limit or spent > CPU_SECONDS):
            return best
        found = measure(rows)
        spent += found.seconds
        if found.bytes is None or found.seconds / rows > FASTER * previous:
            return best
        points.append((rows, found.bytes))
        best, previous = rows, found.seconds / rows
    return best


def expected(points: Sequence[tuple[int, int]], rows: int) -> float:
    """The peak of `rows`, on the line through the last two points; through the last alone, the same for all."""
    (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else (points[0], (1, points[0][1]))
    return y1 + (y1 - y0) / (x1 - x0) * (rows - x1)


class Prober:
    """Tries micro-batches of the trainer's own data and notes their peaks and times."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.device = trainer, trainer.mesh.device
        self.done: list[Probe] = []

    def __call__(self, rows: int) -> Probe:
        """Forward and backward of one micro-batch, with gradients, weights and moments in their places."""
        size, started = None, time.perf_counter()
        try:
            if self.device.type != "cpu":
                self.compute(rows)  # compiles, chooses kernels, makes workspaces
            start_counting(self.device)
            started = time.perf_counter()
            self.compute(rows)
            size = peak_bytes(self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.done.append(Probe(rows, size, time.perf_counter() - started))
        free_memory(self.device)
        return self.done[-1]

    def compute(self, rows: int) -> None:
        """One micro-batch of the first step, compiled on a GPU only; returns when the device is done."""
        trainer = self.trainer
        batch = trainer.loader.step(trainer.step, rows)[0]
        if self.device.type == "cpu":
            with autocast(trainer.config.autocast_precision, self.device):
                loss = trainer.objective.loss_sum(batch)[0]
            loss.backward()
        else:
            trainer.backend.forward_backward([batch], torch.ones((), device=trainer.mesh.device))
        synchronize(self.device)
