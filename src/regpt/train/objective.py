"""The objective of a training method: the units that a step averages over, and the summed loss of a micro-batch."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.model.transformer import Transformer

Sums = tuple[Tensor, dict[str, Tensor]]  # a summed loss, and the sums that are logged next to it: scalars


class Objective(Protocol):
    def units(self, batches: Sequence[Batch]) -> int:
        """Count the units of this process's part of a step (valid targets, pairs, …): its loss is their mean."""
        ...

    def loss_sum(self, batch: Batch) -> Sums:
        """Sum the loss over the units of a micro-batch on the model's device; differentiable.

        The second value holds further sums by name, detached: reduced over ranks and divided like the loss, and logged.
        """
        ...


class NextToken:
    """Pretraining: cross-entropy of the next token in nats, over the valid targets.

    Args:
        model: computes the hidden states; its ops compute the loss.
        z_loss: coefficient of log² Z, Z the sum of exp(logits), which keeps logits from drifting (Chowdhery et al.
            2022, section 5: 1e-4). Part of the training loss only; logged as `z_loss`.
    """

    def __init__(self, model: Transformer, z_loss: float = 0.0):
        self.model, self.z_loss = model, z_loss

    def units(self, batches: Sequence[Batch]) -> int:
        return valid_targets(batches)

    def loss_sum(self, batch: Batch) -> Sums:
        """Scalar, float32 (float64 for a float64 model), under autocast too."""
        idx, targets, positions, cu_seqlens, dropout_keys = batch
        model = self.model
        hidden = model.hidden(idx, positions=positions, cu_seqlens=cu_seqlens, dropout_keys=dropout_keys)  # (B, T, C)
        of_head = hidden.flatten(0, 1), model.head_weight, targets.flatten(), model.config.vocab_size
        if not self.z_loss or not torch.is_grad_enabled():  # a validation loss is the cross-entropy alone
            return model.ops.linear_cross_entropy(*of_head), {}
        loss, squares = model.ops.cross_entropy_with_z_loss(*of_head, self.z_loss)
        return loss, {"z_loss": self.z_loss * squares}


def valid_targets(batches: Sequence[Batch]) -> int:
    """Count the targets of `batches` that carry loss."""
    # NumPy counts half a million of them in 0.1 ms, torch takes four times as long; the GPU may be waiting.
    return sum(int(np.count_nonzero(batch.targets.numpy() != IGNORE_INDEX)) for batch in batches)
