"""The lecture's first forms of what was made faster: attention written out, an optimizer that is not fused."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from regpt.model.ops import PLAIN


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√D)·v (Vaswani et al. 2017, eq. 1), every product written out: what flash attention replaces.

    Arguments and result as in `regpt.model.ops.attention`. Memory: several times B·H·T·S numbers.
    """
    T, S = q.size(-2), k.size(-2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    return (
        scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    )  # (B, H, T, D); autocast takes the softmax in float32


EXPLICIT = replace(PLAIN, attention=explicit_attention)


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same AdamW over the same parameters in PyTorch's own default form, as a script has it that does not ask for
    `fused`: several kernels over lists of tensors on a GPU (foreach), one tensor after another on a CPU."""
    groups = [{**group, "fused": None} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=optimizer.defaults["lr"])
