"""Llama (Touvron et al. 2023; Llama Team 2024) and its relatives, in the names of Llama's published weights.

The relatives differ in a few places (`config.FAMILIES`): biases of q, k and v (Qwen 2), norms of q and k (Qwen 3, OLMo
2), norms after instead of before attention and MLP (OLMo 2), layers without rotation (SmolLM 3), a window (Mistral).
Shapes: the glossary in `regpt.model`.
"""

import math
from typing import Any

import torch.nn as nn
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import FAMILIES, ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.grouped import Routing
from regpt.model.layers import Head, Linear, RMSNorm, Rotation, activation, attend, padded_rows, rotate, rotation
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import SharedInputs, Transformer


def norm_of(config: ModelConfig, size: int, ops: Ops) -> RMSNorm:
    return RMSNorm(size, config.norm_eps, ops, FAMILIES[config.family].norm_offset)


class LlamaAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions (Su et al. 2021)."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        C, D, family = config.n_embd, config.head_size, FAMILIES[config.family]
        bias = config.bias in ("all", "attention", "qkv")
        self.q_proj = Linear(C, config.n_head * D, ops, bias=bias)
        self.k_proj = Linear(C, config.n_kv_head * D, ops, bias=bias)
        self.v_proj = Linear(C, config.n_kv_head * D, ops, bias=bias)
        self.o_proj = Linear(config.n_head * D, C, ops, bias=config.bias in ("all", "attention"))
        self.per_head = family.qk_norm == "head"
        if family.qk_norm:
            sizes = (D, D) if self.per_head else (config.n_head * D, config.n_kv_head * D)
            self.q_norm, self.k_norm = (norm_of(config, size, ops) for size in sizes)
        scalar = config.query_pre_attn_scalar or D
        self.query_scale = 1.0 if scalar == D else math.sqrt(D / scalar)
        self.rotated = not config.no_rope_every or (layer + 1) % config.no_rope_every != 0
        self.qk_norm, self.head_size, self.layer, self.ops = bool(family.qk_norm), D, layer, ops

    def forward(self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        """`x` (B, T, C) and the result alike; `mask` as `ops.translate_mask` gave it."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H·D), (B, T, G·D) twice
        if self.qk_norm and not self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(2, (-1, self.head_size)).transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, D)
        if self.per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            q, k = rotate(q, by), rotate(k, by)
        if self.query_scale != 1:
            q = q * self.query_scale
        return self.o_proj(attend((q, k, v), self.layer, mask, cache, drop, self.ops))


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6), `times` as wide as the configuration states."""

    def __init__(self, config: ModelConfig, ops: Ops, times: int = 1):
        super().__init__()
        bias, inner = config.bias in ("all", "mlp"), times * config.n_inner
        self.gate_proj = Linear(config.n_embd, inner, ops, bias=bias)
        self.up_proj = Linear(config.n_embd, inner, ops, bias=bias)
        self.down_proj = Linear(inner, config.n_embd, ops, bias=bias)
        self.activation = activation(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class LlamaBlock(nn.Module):
    """Attention and MLP, each with an RMSNorm (Zhang & Sennrich 2019) before it. Sites of dropout as in GPT-2's."""

    mlp_class: type[Any] = LlamaMLP

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, ops, layer)
        self.mlp = self.mlp_class(config, ops)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps, ops)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, ops)
        self.layer = layer

    def forward(
        self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF
    ) -> Tensor | tuple[Tensor, Routing]:
        x = x + drop(self.self_attn(self.input_layernorm(x), by, mask, cache, drop), site=3 * self.layer + 2)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), site=3 * self.layer + 3)


class PostNormBlock(nn.Module):
    """OLMo 2's block: the norms are at the outputs (OLMo et al. 2024, section 3.2)."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, ops, layer)
        self.mlp = LlamaMLP(config, ops)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, ops)
        self.post_feedforward_layernorm = RMSNorm(config.n_embd, config.norm_eps, ops)
        self.layer = layer

    def forward(self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        attended = self.post_attention_layernorm(self.self_attn(x, by, mask, cache, drop))
        x = x + drop(attended, site=3 * self.layer + 2)
        return x + drop(self.post_feedforward_layernorm(self.mlp(x)), site=3 * self.layer + 3)


class Llama(Transformer):
    """A token embedding, blocks, a last norm; the head is the embedding or its own."""

    token_embedding = "embed_tokens.weight"
    undecayed = ("*.bias", "*norm.weight")
    residual = ("o_proj.weight", "down_proj.weight")
    block_class: type[nn.Module] = LlamaBlock

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__(config, ops, pad_vocab=pad_vocab)
        self.shape = shape = config.resolved()
        rows = padded_rows(config.vocab_size, pad_vocab)
        block = PostNormBlock if FAMILIES[config.family].norm_after else self.block_class
        self.embed_tokens = nn.Embedding(rows, config.n_embd)
        self.layers = nn.ModuleList(block(shape, ops, layer) for layer in range(config.n_layer))
        self.norm = norm_of(config, config.n_embd, ops)
        self.lm_head = None if config.tie_embeddings else Head(rows, config.n_embd)

    def stack(self, idx: Tensor, positions: Tensor, shared: SharedInputs) -> Tensor:
        mask, cache, drop, routes = shared
        x = drop(self.embed_tokens(idx), site=0)  # (B, T, C)
        by = rotation(self.shape, positions)
        for block in self.layers:
            x = block(x, by, mask, cache, drop)
            if isinstance(x, tuple):  # from a block of experts
                x, routing = x
                if routes is not None:
                    routes.append(routing)
        return self.norm(x)
