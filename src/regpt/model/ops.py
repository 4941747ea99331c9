"""The operations that a faster kernel may replace, in plain PyTorch: the reference, which defines their meaning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.model.chunked import SeenKeys, attention_in_chunks, plain_mask
from regpt.model.grouped import Matrices, experts_grouped
from regpt.model.head import IGNORE_INDEX as IGNORE_INDEX
from regpt.model.head import cross_entropy_with_z_loss, linear_cross_entropy
from regpt.model.masks import AttentionMask, causal_mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | SeenKeys | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), causal without a mask.

    Args:
        q: (B, H, T, D).
        k, v: (B, G, S, D), S ≥ T, each for H / G queries; without a mask the last T of the S positions are those of
            the queries.
        mask: bool, broadcastable to (B, H, T, S), True where a query sees a key (`sdpa_mask`); or the bounds of what
            it sees. None means causal.

    Returns:
        (B, H, T, D), the dtype of q.
    """
    if isinstance(mask, SeenKeys):
        return attention_in_chunks(q, k, v, mask)
    T, S = q.size(-2), k.size(-2)
    if mask is None and T not in (S, 1):  # several queries after a cache: query i sees S - T + i + 1 keys
        mask = causal_mask(T, S, q.device)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T == S, enable_gqa=grouped
    )


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: Callable[[Tensor], Tensor]
) -> Tensor:
    """`attention` with `dropout` of the probabilities (B, H, T, S), which are kept for the backward. Not torch's
    `dropout_p`, which draws its masks from the global generator."""
    mask = causal_mask(q.size(-2), k.size(-2), q.device) if mask is None else mask
    k, v = (y.repeat_interleave(q.size(1) // y.size(1), dim=1) if y.size(1) != q.size(1) else y for y in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    return dropout(scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)) @ v


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation (Ba et al. 2016, eq. 4) over the last dimension; x (..., C), weight and bias (C,)."""
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang & Sennrich 2019, eq. 4) over the last dimension; x (..., C), weight (C,).

    Computed in float32 where x has less, and rounded before the product with the weight, as transformers does.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) · weightᵀ + bias; weight (F, C), bias (F,). A layer of a block: the head has its own operation."""
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Ops:
    """One choice of implementation for each operation, with the signatures of the functions above, in `model.head`
    and in `model.grouped`.

    Attributes:
        translate_mask: (mask, B, T, S, device) → what `attention` takes as its mask; called once a forward.
        head: the product of `Transformer.logits`, without a bias; losses have their own.
    """

    attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor] = attention
    translate_mask: Callable[[AttentionMask, int, int, int, torch.device], Any] = plain_mask
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = layer_norm
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    gelu: Callable[[Tensor], Tensor] = gelu
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    head: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    experts: Callable[[Tensor, tuple[Tensor, Tensor], Matrices, Callable[[Tensor], Tensor]], Tensor] = experts_grouped
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = linear_cross_entropy
    cross_entropy_with_z_loss: Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]] = (
        cross_entropy_with_z_loss
    )


PLAIN = Ops()
