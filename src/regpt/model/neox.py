"""GPT-NeoX (Black et al. 2022) as in Pythia (Biderman et al. 2023), in the names of the published weights.

Attention and MLP read the same residual stream and are added together; a part of each head is rotated; queries, keys
and values of a head are next to each other in one product. Shapes: the glossary in `regpt.model`.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.layers import Head, LayerNorm, Linear, Rotation, activation, attend, padded_rows, rotate, rotation
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import SharedInputs, Transformer


class NeoXAttention(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        bias, width = config.bias in ("all", "attention"), config.n_head * config.head_size
        self.query_key_value = Linear(config.n_embd, 3 * width, ops, bias=bias or config.bias == "qkv")
        self.dense = Linear(width, config.n_embd, ops, bias=bias)
        self.head_size, self.layer, self.ops = config.head_size, layer, ops

    def forward(self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        """`x` (B, T, C) and the result alike; `mask` as `ops.translate_mask` gave it."""
        qkv = self.query_key_value(x).unflatten(2, (-1, 3 * self.head_size)).transpose(1, 2)  # (B, H, T, 3·D)
        q, k, v = qkv.chunk(3, dim=-1)
        return self.dense(attend((rotate(q, by), rotate(k, by), v), self.layer, mask, cache, drop, self.ops))


class NeoXMLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        bias = config.bias in ("all", "mlp")
        self.dense_h_to_4h = Linear(config.n_embd, config.n_inner, ops, bias=bias)
        self.dense_4h_to_h = Linear(config.n_inner, config.n_embd, ops, bias=bias)
        self.activation = activation(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))  # (B, T, C)


class NeoXBlock(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)). Sites of dropout as in GPT-2's block."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(config, ops)
        self.post_attention_layernorm = LayerNorm(config, ops)
        self.attention = NeoXAttention(config, ops, layer)
        self.mlp = NeoXMLP(config, ops)
        self.layer = layer

    def forward(self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        attended = drop(self.attention(self.input_layernorm(x), by, mask, cache, drop), site=3 * self.layer + 2)
        return drop(self.mlp(self.post_attention_layernorm(x)), site=3 * self.layer + 3) + attended + x


class NeoX(Transformer):
    """A token embedding, parallel blocks, a last norm; the head is its own in all published models."""

    token_embedding, own_head = "embed_in.weight", "embed_out"
    undecayed = ("*.bias", "*norm.weight")
    residual = ("dense.weight", "dense_4h_to_h.weight")

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__(config, ops, pad_vocab=pad_vocab)
        self.shape = shape = config.resolved()
        rows = padded_rows(config.vocab_size, pad_vocab)
        self.embed_in = nn.Embedding(rows, config.n_embd)
        self.layers = nn.ModuleList(NeoXBlock(shape, ops, layer) for layer in range(config.n_layer))
        self.final_layer_norm = LayerNorm(config, ops)
        self.embed_out = None if config.tie_embeddings else Head(rows, config.n_embd)

    def stack(self, idx: Tensor, positions: Tensor, shared: SharedInputs) -> Tensor:
        mask, cache, drop, _ = shared
        x = drop(self.embed_in(idx), site=0)  # (B, T, C)
        by = rotation(self.shape, positions)
        for block in self.layers:
            x = block(x, by, mask, cache, drop)
        return self.final_layer_norm(x)
