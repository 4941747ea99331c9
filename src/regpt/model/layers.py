"""Layers that several families share. Shapes: the glossary in `regpt.model`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import Dropout
from regpt.model.head import LIBRARY
from regpt.model.ops import Ops, attention_with_dropout

VOCAB_MULTIPLE = 128  # a vocabulary padded to whole tensor-core tiles is faster; the lecture pads 50257 to 50304

Rotation = tuple[Tensor, Tensor]  # cosine and sine of each position's angles, (T, R/2) or (B, 1, T, R/2)


class LayerNorm(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if bias else None
        self.eps, self.ops = config.norm_eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)  # (B, T, C)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, ops: Ops, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.eps, self.offset, self.ops = eps, offset, ops

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return self.ops.rms_norm(x, weight, self.eps)  # (..., size)


class Linear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, ops: Ops, *, bias: bool = True):
        super().__init__(n_in, n_out, bias)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.linear(input, self.weight, self.bias)  # (..., n_out)


class Head(nn.Module):
    """An output projection of its own; the product is the loss's or `Transformer.logits`'."""

    def __init__(self, rows: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, n_embd))


def padded_rows(vocab_size: int, pad_vocab: bool) -> int:
    multiple = VOCAB_MULTIPLE if pad_vocab else 1
    return math.ceil(vocab_size / multiple) * multiple


def activation(config: ModelConfig, ops: Ops) -> Callable[[Tensor], Tensor]:
    """The MLP's activation; `config` resolved. `gelu_tanh` is GPT-2's and may be replaced by a kernel."""
    return {"gelu_tanh": ops.gelu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}[config.activation]


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], layer: int, mask: Any, cache: Cache | None, drop: Dropout, ops: Ops
) -> Tensor:
    """Attention of `layer` and its place in the cache: q (B, H, T, D), k and v (B, G, T, D) to (B, T, H·D)."""
    q, k, v = qkv
    if cache is not None:
        y = cache.attend(layer, q, k, v, mask, ops.attention)  # (B, H, T, D)
    elif drop.keys is None:
        y = ops.attention(q, k, v, mask)  # (B, H, T, D)
    else:
        y = attention_with_dropout(q, k, v, mask, partial(drop, site=3 * layer + 1))
    return y.transpose(1, 2).flatten(2)  # (B, T, H·D)


def rotation(config: ModelConfig, positions: Tensor) -> Rotation:
    """Cosine and sine, float32, of the angles of `positions` (T,) or (B, T): (T, R/2) or (B, 1, T, R/2), R the rotated
    dimensions of a head (Su et al. 2021, eq. 14).

    Angles are float32 in every precision, as in transformers: its float64 models then agree to the last digits.
    """
    cos_and_sin = torch.ops.regpt.cos_and_sin if torch.compiler.is_compiling() else of_angles
    cos, sin = cos_and_sin(positions, rope_frequencies(config, positions.device))
    return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])


def of_angles(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Cosine and sine (…, R/2) of positions (…) times frequencies (R/2,).

    One operation to the compiler, which would otherwise compute powers, cosines and sines anew in the kernel of each
    layer, forward and backward, for every element of q and k.
    """
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


LIBRARY.define("cos_and_sin(Tensor positions, Tensor frequencies) -> (Tensor, Tensor)")
LIBRARY.impl("cos_and_sin", of_angles, "CompositeExplicitAutograd")
torch.library.register_fake("regpt::cos_and_sin", of_angles, lib=LIBRARY)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(R/2,) float32, radians a position. `linear`: Chen et al. 2023, section 3.2; `llama3`: stretched by the factor
    where a wavelength exceeds the longest row of before, in between an interpolation (Llama 3's code, 2024)."""
    R = config.rotated_size
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, device=device).float() / R)
    if config.rope_type == "linear":
        return frequencies / config.rope_factor
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_max_seq_len / (2 * math.pi / frequencies)  # in the longest row of before
        kept = (turns - low) / (high - low)
        between = (1 - kept) * frequencies / config.rope_factor + kept * frequencies
        stretched = torch.where(turns < low, frequencies / config.rope_factor, between)
        return torch.where(turns > high, frequencies, stretched)
    return frequencies


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the first R dimensions of each head, pairs (i, i + R/2) as in transformers; x (B, H, T, D), alike out.

    Computed in float32 where x has less.
    """
    cos, sin = by
    R = 2 * cos.size(-1)
    left, right, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
    cos, sin = (cos.to(x.dtype), sin.to(x.dtype)) if x.dtype == torch.float64 else (cos, sin)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned
