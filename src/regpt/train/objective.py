"""Objective of a training method: the summed loss of a micro-batch, and the units that a step averages it over."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.model.transformer import Transformer
from regpt.train.balance import Balance

Sums = tuple[Tensor, dict[str, Tensor]]  # the summed loss, and further sums by name: scalars to log, or counts
LARGEST = "max_"  # begins the names of what is not summed: of a step the largest is kept


class Objective(Protocol):
    def units(self, batches: Sequence[Batch]) -> int:
        """Count this rank's units of a step (valid targets, pairs, …): the loss is the mean over those of all ranks."""
        ...

    def loss_sum(self, batch: Batch) -> Sums:
        """Sum the loss over the units of a micro-batch on the model's device; differentiable.

        The second value holds further sums by name, detached; they are reduced and divided like the loss, and logged.
        Integers (counts) are not divided. Of a name that begins with `LARGEST` the largest value counts instead.
        """
        ...


class NextToken:
    """Pretraining: cross-entropy of the next token in nats, over the valid targets.

    Args:
        model: computes the hidden states; its ops compute the loss.
        z_loss: coefficient of log² Z, Z the sum of exp(logits), which keeps logits from drifting (Chowdhery et al.
            2022, section 5: 1e-4). Part of the training loss only; logged as `z_loss`.
        balance: of a model with experts; its losses are part of the training loss only.
    """

    def __init__(self, model: Transformer, z_loss: float = 0.0, balance: Balance | None = None):
        self.model, self.z_loss, self.balance = model, z_loss, balance

    def units(self, batches: Sequence[Batch]) -> int:
        return valid_targets(batches)

    def loss_sum(self, batch: Batch) -> Sums:
        """Scalar, float32 (float64 for a float64 model), under autocast too."""
        idx, targets, positions, cu_seqlens, dropout_keys = batch[:5]
        model = self.model
        training = torch.is_grad_enabled()  # validation reports the plain cross-entropy
        routes = [] if self.balance and training else None
        hidden = model.hidden(
            idx, positions=positions, cu_seqlens=cu_seqlens, dropout_keys=dropout_keys, routes=routes
        )  # (B, T, C)
        inputs = hidden.flatten(0, 1), model.head_weight, targets.flatten(), model.config.vocab_size
        if self.z_loss and training:
            loss, squares = model.ops.cross_entropy_with_z_loss(*inputs, self.z_loss)
            extras = {"z_loss": self.z_loss * squares}
        else:
            loss, extras = model.ops.linear_cross_entropy(*inputs), {}
        if self.balance is None or routes is None:
            return loss, extras
        further, sums = self.balance.sums(routes, targets.flatten() != IGNORE_INDEX)
        return loss + further, extras | sums


def valid_targets(batches: Sequence[Batch]) -> int:
    """Count the targets of `batches` that are not IGNORE_INDEX."""
    # NumPy, not torch: 0.1 ms for half a million targets instead of 0.4, while the GPU may be idle.
    return sum(int(np.count_nonzero(batch.targets.numpy() != IGNORE_INDEX)) for batch in batches)
