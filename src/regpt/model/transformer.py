"""GPT-2 (Radford et al. 2019), in GPT-2's own names. Shapes: the glossary in `regpt.model`."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regpt.model.cache import KVCache
from regpt.model.config import ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.masks import CAUSAL, AttentionMask
from regpt.model.ops import PLAIN, Ops, attention_with_dropout

VOCAB_MULTIPLE = 128  # a vocabulary padded to whole tensor-core tiles is faster; the lecture pads 50257 to 50304
INIT_STD = 0.02  # GPT-2: Radford et al. 2018, section 4.1
NORM_EPS = 1e-5  # the value in OpenAI's code


class LayerNorm(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, NORM_EPS)  # (B, T, C)


class Linear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, ops: Ops):
        super().__init__(n_in, n_out)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.linear(input, self.weight, self.bias)  # (..., n_out)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, ops)  # q, k and v of all heads in one product
        self.c_proj = Linear(config.n_embd, config.n_embd, ops)
        self.n_head = config.n_head
        self.layer = layer
        self.ops = ops

    def forward(self, x: Tensor, mask: Any, cache: KVCache | None, drop: Dropout = OFF) -> Tensor:
        """`x` (B, T, C) and the result alike; `mask` as `ops.translate_mask` gave it."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        if drop.keys is None:
            y = self.ops.attention(q, k, v, mask)  # (B, H, T, D)
        else:
            y = attention_with_dropout(q, k, v, mask, partial(drop, site=3 * self.layer + 1))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, ops)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, ops)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.ops.gelu(self.c_fc(x)))  # (B, T, C)


class Block(nn.Module):
    """One pre-norm block. Sites of dropout: 0 is the embeddings'; 3·layer + 1, 2, 3 are those of the attention's
    probabilities, its output and the MLP's output."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = CausalSelfAttention(config, ops, layer)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config, ops)
        self.layer = layer

    def forward(self, x: Tensor, mask: Any, cache: KVCache | None, drop: Dropout = OFF) -> Tensor:
        x = x + drop(self.attn(self.ln_1(x), mask, cache, drop), site=3 * self.layer + 2)
        return x + drop(self.mlp(self.ln_2(x)), site=3 * self.layer + 3)


class Transformer(nn.Module):
    """Token ids to logits. Set the weights with `weights.initialize` or `weights.load_weights`; build under
    `weights.without_memory`, which skips torch's own initialisation.

    Args:
        config: the shape.
        ops: implementations of the replaceable operations.
        pad_vocab: pad the rows of the embedding with zeros to a multiple of 128. Padded rows never reach a logit, a
            loss, a checkpoint or a parameter count.
    """

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__()
        self.config = config
        self.ops = ops
        multiple = VOCAB_MULTIPLE if pad_vocab else 1
        self.wte = nn.Embedding(math.ceil(config.vocab_size / multiple) * multiple, config.n_embd)
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config, ops)

    padded_names = frozenset({"wte.weight"})  # parameters whose rows are padded
    token_embedding, position_embedding = "wte.weight", "wpe.weight"  # names of parameters, each (rows, C)

    def default_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups by name: weight decay for products and embeddings, not for biases and LayerNorms."""
        return [{"pattern": p, "weight_decay": 0.0} for p in ("*.bias", "*ln_?.weight")] + [{"pattern": "*"}]

    @property
    def head_weight(self) -> Tensor:
        """(V, C), V padded: the output projection, tied to the token embedding (Press & Wolf 2017)."""
        return self.wte.weight

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order: what is recomputed, sharded or distributed as a whole."""
        return self.h

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; what is computed under autocast may differ."""
        return self.head_weight.dtype

    def init_std(self, name: str) -> float:
        """Standard deviation of the initial values of the matrix `name`: GPT-2's 0.02, times (2·n_layer)^-½ for
        projections into the residual stream (Radford et al. 2019, section 2.3)."""
        return INIT_STD / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else INIT_STD

    def matmul_parameters(self, *, padded: bool = False) -> int:
        """Weights of matrix products: of all linear layers and of the head, whose `padded` rows are left out unless
        asked for. Embeddings are looked up, not multiplied."""
        rows = self.head_weight.size(0) if padded else self.config.vocab_size
        linear = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return linear + rows * self.head_weight.size(1)

    def attention_flops(self, seq_len: int) -> int:
        """FLOPs of the two products of attention for one token of `seq_len`, forward and backward, without a discount
        for causality: 12·n_embd·T a block (Chowdhery et al. 2022, appendix B)."""
        layers = [module for module in self.modules() if isinstance(module, CausalSelfAttention)]
        return sum(12 * layer.c_proj.in_features * seq_len for layer in layers)

    def hidden(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        mask: AttentionMask = CAUSAL,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of the tokens `idx` (B, T) int64, each below vocab_size.

        `positions` (B, T) default to those after the cache's. `cu_seqlens` (documents + 1,) int, cumulative document
        lengths from 0 to B·T, are the documents of `mask`; `positions` must then restart in each. With a tree, rows may
        be longer than the model. `cache` holds the keys and values of earlier tokens and takes those of `idx`.
        `dropout_keys` (B,), for training alone, are the rows' keys of dropout at `config.dropout`; without them there
        is no dropout, in training mode either.

        Raises:
            ValueError: more positions than the model has; documents or a tree without positions or with a cache.
        """
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        mask = mask if cu_seqlens is None else replace(mask, documents=cu_seqlens)
        if mask.tree is None and start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} tokens given, the model has {self.config.max_seq_len} positions")
        if mask.packed and (positions is None or cache is not None):
            raise ValueError("documents or a tree were given; give positions that restart in each, and no cache")
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        seen = self.ops.translate_mask(mask, B, T, start + T, idx.device)
        drop = Dropout(self.config.dropout, dropout_keys if self.config.dropout else None)
        x = drop(self.wte(idx) + self.wpe(positions), site=0)  # (B, T, C)
        for block in self.h:
            x = block(x, seen, cache, drop)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) for the token after each of `idx`; arguments as in `hidden`."""
        return self.logits(self.hidden(idx, positions=positions, cu_seqlens=cu_seqlens, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., C), for callers who need only some positions."""
        return nn.functional.linear(hidden, self.head_weight)[..., : self.config.vocab_size]
