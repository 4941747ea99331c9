"""GPT-2 (Radford et al. 2019), in GPT-2's own names. Shapes: the glossary in `regpt.model`."""

from typing import Any

import torch.nn as nn
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.layers import Head, LayerNorm, Linear, activation, attend, padded_rows
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import SharedInputs, Transformer


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        bias = config.bias in ("all", "attention")
        # q, k and v of all heads in one product
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, ops, bias=bias or config.bias == "qkv")
        self.c_proj = Linear(config.n_embd, config.n_embd, ops, bias=bias)
        self.n_head = config.n_head
        self.scale_by = layer + 1 if config.attention_scale_by_layer else 1
        self.layer = layer
        self.ops = ops

    def forward(self, x: Tensor, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        """`x` (B, T, C) and the result alike; `mask` as `ops.translate_mask` gave it."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        q = q / self.scale_by if self.scale_by != 1 else q
        return self.c_proj(attend((q, k, v), self.layer, mask, cache, drop, self.ops))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        bias = config.bias in ("all", "mlp")
        self.c_fc = Linear(config.n_embd, config.n_inner, ops, bias=bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, ops, bias=bias)
        self.activation = activation(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # (B, T, C)


class Block(nn.Module):
    """One pre-norm block. Sites of dropout: 0 is the embeddings'; 3·layer + 1, 2, 3 are those of the attention's
    probabilities, its output and the MLP's output."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops, bias=config.bias != "none")
        self.attn = CausalSelfAttention(config, ops, layer)
        self.ln_2 = LayerNorm(config, ops, bias=config.bias != "none")
        self.mlp = MLP(config, ops)
        self.layer = layer

    def forward(self, x: Tensor, mask: Any, cache: Cache | None, drop: Dropout = OFF) -> Tensor:
        x = x + drop(self.attn(self.ln_1(x), mask, cache, drop), site=3 * self.layer + 2)
        return x + drop(self.mlp(self.ln_2(x)), site=3 * self.layer + 3)


class GPT2(Transformer):
    """Embeddings of tokens and positions, blocks, a last norm; the head is the token embedding."""

    token_embedding, position_embedding, block_list = "wte.weight", "wpe.weight", "h"
    undecayed = ("*.bias", "*ln_?.weight")
    residual = ("c_proj.weight",)

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__(config, ops, pad_vocab=pad_vocab)
        shape = config.resolved()
        rows = padded_rows(config.vocab_size, pad_vocab)
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd)
        self.h = nn.ModuleList(Block(shape, ops, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config, ops, bias=shape.bias != "none")
        self.lm_head = None if config.tie_embeddings else Head(rows, config.n_embd)

    def stack(self, idx: Tensor, positions: Tensor, shared: SharedInputs) -> Tensor:
        mask, cache, drop, _ = shared
        x = drop(self.wte(idx) + self.wpe(positions), site=0)  # (B, T, C)
        for block in self.h:
            x = block(x, mask, cache, drop)
        return self.ln_f(x)
