"""What every family of models answers for itself. The forwards: `gpt2`, `llama`, `neox`, one a file."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from regpt.model.adapter_config import AdapterConfig
from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import Dropout
from regpt.model.grouped import Routing
from regpt.model.masks import CAUSAL, AttentionMask, sdpa_mask
from regpt.model.ops import PLAIN, Ops

Routes = list[Routing] | None  # what the layers' routers decided, appended in order

INIT_STD = 0.02  # GPT-2: Radford et al. 2018, section 4.1


class SharedInputs(NamedTuple):
    """What all blocks of one forward take besides their input; `mask` as `Transformer.masks` returned it."""

    mask: Any
    cache: Cache | None
    drop: Dropout
    routes: Routes


class Transformer(nn.Module):
    """Token ids to logits: the base of all families, built by `families.make_model`. Set the weights with
    `weights.initialize` or `weights.load_weights`; build under `weights.without_memory`, which skips torch's own
    initialisation.

    Args:
        config: the shape.
        ops: implementations of the replaceable operations.
        pad_vocab: pad the rows of embedding and head with zeros to a multiple of 128.

    Attributes:
        token_embedding, position_embedding: names of parameters, each (rows, C); None where there is no such.
        own_head: name of the module of a head of its own, None where the head is the token embedding.
        block_list: name of the list of blocks.
        undecayed: patterns of the names of parameters without weight decay.
        residual: endings of the names of matrices that project into the residual stream.
        adapter, adapter_dropout: set by `adapters.adapt`.
    """

    token_embedding: str
    position_embedding: str | None = None
    own_head: str = "lm_head"
    block_list: str = "layers"
    undecayed: tuple[str, ...]
    residual: tuple[str, ...]
    adapter: AdapterConfig | None = None
    adapter_dropout: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Transformer":
        """`Transformer(config)` is a model of the configuration's family."""
        made: type[Transformer] = cls
        if cls is Transformer:
            from regpt.model.families import forward_of  # which imports this file

            made = forward_of(kwargs.get("config") or args[0])
        return nn.Module.__new__(made)

    def __init__(self, config: ModelConfig, ops: Ops = PLAIN, *, pad_vocab: bool = True):
        super().__init__()
        self.config = config
        self.ops = ops
        self.reward_head = nn.Linear(config.n_embd, 1, bias=False) if config.reward_head else None

    def stack(self, idx: Tensor, positions: Tensor, shared: SharedInputs) -> Tensor:
        """The family's forward: from token ids (B, T) and their positions to hidden states (B, T, C)."""
        raise NotImplementedError

    def masks(self, mask: AttentionMask, translate: Callable[[AttentionMask], Any]) -> Any:
        """What `stack` takes as its mask: `mask` and the model's own window, for the implementation of attention."""
        window = self.config.window
        return translate(replace(mask, window=window) if window and mask.window is None else mask)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), V padded: the output projection."""
        head = getattr(self, self.own_head)
        return (getattr(self, self.token_embedding.removesuffix(".weight")) if head is None else head).weight

    @property
    def padded_names(self) -> frozenset[str]:
        """Parameters whose rows are padded to the padded vocabulary. Padded rows never reach a logit, a loss, a
        checkpoint or a parameter count."""
        tied = getattr(self, self.own_head) is None
        return frozenset({self.token_embedding} if tied else {self.token_embedding, f"{self.own_head}.weight"})

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order: what is recomputed, sharded or distributed as a whole."""
        return getattr(self, self.block_list)

    def default_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups by name: weight decay for products and embeddings, not for biases and norms."""
        undecayed = (*self.undecayed, "*.lora_magnitude")
        return [{"pattern": p, "weight_decay": 0.0} for p in undecayed] + [{"pattern": "*"}]

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
        return INIT_STD / math.sqrt(2 * self.config.n_layer) if name.endswith(self.residual) else INIT_STD

    def matmul_parameters(self, *, padded: bool = False) -> int:
        """Weights of matrix products: of all linear layers and of the head, whose `padded` rows are left out unless
        asked for. Embeddings are looked up, not multiplied."""
        rows = self.head_weight.size(0) if padded else self.config.vocab_size
        linear = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        return linear + rows * self.head_weight.size(1)

    def idle_parameters(self) -> int:
        """Weights that a token has no part in: of experts that it is not routed to."""
        return 0

    def attention_flops(self, seq_len: int) -> int:
        """FLOPs of the two products of attention for one token of `seq_len`, forward and backward, without a discount
        for causality: 12·H·D·T a block (Chowdhery et al. 2022, appendix B), T at most the window."""
        shape = self.config.resolved()
        seen = min(seq_len, shape.window or seq_len)
        return 12 * shape.n_layer * shape.n_head * shape.head_size * seen

    def hidden(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        mask: AttentionMask = CAUSAL,
        dropout_keys: Tensor | None = None,
        routes: Routes = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of the tokens `idx` (B, T) int64, each below vocab_size.

        `positions` (B, T) default to those after the cache's. `cu_seqlens` (documents + 1,) int, cumulative document
        lengths from 0 to B·T, are the documents of `mask`; `positions` must then restart in each. With a tree, rows may
        be longer than the model. `cache` holds the keys and values of earlier tokens and takes those of `idx`.
        `dropout_keys` (B,), for training alone, are the rows' keys of dropout at `config.dropout`; without them there
        is no dropout, in training mode either. To `routes` each layer of experts appends its routing of the B·T tokens.

        Raises:
            ValueError: more positions than the model has; documents or a tree without positions or with a cache.
        """
        B, T = idx.shape
        start, ragged = (0, False) if cache is None else (cache.length, cache.ragged)
        mask = mask if cu_seqlens is None else replace(mask, documents=cu_seqlens)
        if mask.tree is None and not ragged and start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} tokens given, the model has {self.config.max_seq_len} positions")
        if mask.packed and (positions is None or cache is not None):
            raise ValueError("documents or a tree were given; give positions that restart in each, and no cache")
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        if self.adapter_dropout is not None:
            self.adapter_dropout.keys = dropout_keys
        drop = Dropout(self.config.dropout, dropout_keys if self.config.dropout else None)
        translate = self.ops.translate_mask if drop.keys is None else sdpa_mask  # as `attention_with_dropout` takes it
        seen = self.masks(mask, lambda one: one if ragged else translate(one, B, T, start + T, idx.device))
        x = self.stack(idx, positions, SharedInputs(seen, cache, drop, routes))  # (B, T, C)
        if cache is not None:
            cache.length += T
        return x

    def forward(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) for the token after each of `idx`; arguments as in `hidden`."""
        return self.logits(self.hidden(idx, positions=positions, cu_seqlens=cu_seqlens, cache=cache))

    def rewards(self, hidden: Tensor) -> Tensor:
        """Rewards (...) of answers whose last tokens have the hidden states (..., C); float32 at least. `config` has a
        `reward_head`."""
        assert self.reward_head is not None
        weight = self.reward_head.weight[0]
        width = torch.promote_types(weight.dtype, torch.float32)
        return (hidden.to(width) * weight.to(width)).sum(dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., C), for callers who need only some positions."""
        return self.ops.head(hidden, self.head_weight, None)[..., : self.config.vocab_size]
