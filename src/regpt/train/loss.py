"""A micro-batch's summed loss in the precision of the run, compiled if asked for."""

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.kernels.select import check_compiler, fused_loss
from regpt.model.loss import loss_sum as summed_loss
from regpt.model.transformer import Transformer
from regpt.train.config import PrecisionName
from regpt.train.precision import autocast

LossSum = Callable[[Batch], Tensor]


def make_loss_sum(
    model: Transformer,
    precision: PrecisionName,
    device: torch.device,
    compile: bool,
    kernels: Literal["plain", "fused"] = "plain",
    *,
    deterministic: bool = False,
) -> LossSum:
    """`loss_sum(batch)`: cross-entropy in nats summed over the valid targets of `batch`, a float32 scalar.

    Compiled, it is the model's forward and the loss in one graph; the model itself is left as it is, so sampling and
    evaluation go on using it. Fused (`kernels.gpt2`), gradients go straight to `.grad` of the parameters.
    `deterministic`: compiled without choices that depend on timings.
    """
    if kernels == "fused":
        of_tokens = fused_loss(model, device, precision)
        return lambda batch: of_tokens(batch.idx, batch.targets, batch.positions, batch.cu_seqlens)

    def loss_sum(batch: Batch) -> Tensor:
        with autocast(precision, device):
            idx, targets, positions, cu_seqlens, keys = batch
            return summed_loss(model, idx, targets, positions=positions, cu_seqlens=cu_seqlens, dropout_keys=keys)

    if compile:
        check_compiler(device)
    return compiled(loss_sum, deterministic) if compile else loss_sum


def compiled(loss_sum: LossSum, deterministic: bool = False) -> LossSum:
    """`loss_sum`, compiled once for a shape of idx, however many documents a batch holds."""
    # Inductor's option skips all that is decided by timing kernels and moves numbers.
    options: dict[str, str | int | bool | Callable[..., object]] = {"deterministic": True}
    static = torch.compile(loss_sum, dynamic=False, options=options if deterministic else None)

    @functools.wraps(loss_sum)
    def call(batch: Batch) -> Tensor:
        if batch.cu_seqlens is not None:
            torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)  # else each new length would compile everything again
        return static(batch)

    return call


def uncompiled(loss_sum: LossSum) -> LossSum | None:
    """The function that `loss_sum` was compiled from; None when it is not compiled."""
    return getattr(loss_sum, "__wrapped__", None)


def valid_targets(batches: list[Batch]) -> int:
    """Targets of `batches` that carry loss."""
    # NumPy counts half a million of them in 0.1 ms, torch takes four times as long; the GPU may be waiting.
    return sum(int(np.count_nonzero(batch.targets.numpy() != IGNORE_INDEX)) for batch in batches)
