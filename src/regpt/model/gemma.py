"""Gemma 3's language model (Gemma Team 2025, arXiv 2503.19786), in the names of its published weights.

On top of `llama`: most layers have a window and short wavelengths, every k-th sees all (section 2); norms before and
after attention and MLP, whose weights are offsets from 1; embeddings times √C; a scale of their own for queries.
Shapes: the glossary in `regpt.model`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.layers import Rotation, rotation
from regpt.model.llama import Llama, LlamaAttention, LlamaMLP, norm_of
from regpt.model.masks import AttentionMask
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import SharedInputs


class GemmaBlock(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, ops, layer)
        self.mlp = LlamaMLP(config, ops)
        self.input_layernorm, self.post_attention_layernorm = (norm_of(config, config.n_embd, ops) for _ in range(2))
        self.pre_feedforward_layernorm = norm_of(config, config.n_embd, ops)
        self.post_feedforward_layernorm = norm_of(config, config.n_embd, ops)
        self.layer = layer

    def forward(self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), by, mask, cache, drop)
        x = x + drop(self.post_attention_layernorm(attended), site=3 * self.layer + 2)
        computed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + drop(self.post_feedforward_layernorm(computed), site=3 * self.layer + 3)


class Gemma(Llama):
    block_class = GemmaBlock

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__(config, ops, pad_vocab=pad_vocab)
        theta = self.shape.rope_local_theta or self.shape.rope_theta
        self.near = replace(self.shape, rope_theta=theta).unstretched()  # the shape of layers with a window
        self.sees_all = self.shape.full_attention_layers()

    def masks(self, mask: AttentionMask, translate: Callable[[AttentionMask], Any]) -> Any:
        """Of the layers with a window, and of those that see all."""
        return super().masks(mask, translate), translate(mask)

    def stack(self, idx: Tensor, positions: Tensor, shared: SharedInputs) -> Tensor:
        mask, cache, drop, _ = shared
        # As in Google's code and transformers the factor is rounded to the weights' format.
        factor = torch.full((), math.sqrt(self.shape.n_embd), dtype=torch.float32, device=idx.device).to(self.dtype)
        x = drop(self.embed_tokens(idx) * factor, site=0)  # (B, T, C)
        near, far = (rotation(self.near, positions), mask[0]), (rotation(self.shape, positions), mask[1])
        for block, sees_all in zip(self.layers, self.sees_all):
            x = block(x, *(far if sees_all else near), cache, drop)
        return self.norm(x)

    def attention_flops(self, seq_len: int) -> int:
        n_far = sum(self.sees_all)
        near, far = super().attention_flops(seq_len), 12 * self.shape.n_head * self.shape.head_size * seq_len
        return near // self.shape.n_layer * (self.shape.n_layer - n_far) + far * n_far
