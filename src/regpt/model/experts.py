"""Mixtures of experts: Llama's blocks with a router and experts instead of one MLP (Shazeer et al. 2017; Jiang et al.
2024, section 2), in the names of the published weights.

Mixtral, OLMoE and Qwen 3's mixtures differ in norms of q and k and in whether the k weights of a token add up to 1.
Shapes: the glossary in `regpt.model`, and N tokens (B·T), E experts, k experts of a token.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regpt.model.cache import Cache
from regpt.model.config import ModelConfig
from regpt.model.dropout import OFF, Dropout
from regpt.model.grouped import Routing
from regpt.model.head import under_autocast, wide
from regpt.model.layers import Rotation, activation
from regpt.model.llama import Llama, LlamaBlock, LlamaMLP
from regpt.model.ops import Ops


class Router(nn.Module):
    """The k experts of each token and their weights: softmax over all experts, of which the k largest are kept, and
    with `norm_topk` divided by their sum.

    Computed in float32 at least (Fedus et al. 2022, section 2.4). A bias, where there is one, takes part in the choice
    only (DeepSeek-AI 2024, eq. 16): no optimizer moves it, `train.balance` does.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_expert), requires_grad=False) if config.expert_bias else None
        self.k, self.norm_topk = config.n_expert_active, config.norm_topk

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Weights (N, k) and routing of `x` (N, C)."""
        dtype, kind = wide(x.dtype), x.device.type
        with torch.autocast(kind, enabled=False) if under_autocast(kind) else nullcontext():
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # (N, E)
        shares = logits.softmax(dim=-1)
        chosen = (shares if self.bias is None else shares + self.bias).topk(self.k, dim=-1).indices  # (N, k)
        weights = shares.gather(1, chosen)
        return weights / weights.sum(dim=-1, keepdim=True) if self.norm_topk else weights, Routing(logits, chosen)


class ExpertMatrix(nn.Module):
    """One of the matrices of all experts: (E, n_out, n_in)."""

    def __init__(self, n_expert: int, n_out: int, n_in: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_out, n_in))


class ExpertMatrices(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        E, inner, C = config.n_expert, config.n_inner, config.n_embd
        self.gate_proj, self.up_proj = ExpertMatrix(E, inner, C), ExpertMatrix(E, inner, C)
        self.down_proj = ExpertMatrix(E, C, inner)


class ExpertsMLP(nn.Module):
    """Router and experts; shared experts, which see every token, are one wide MLP (Dai et al. 2024, section 3.2)."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.gate, self.experts = Router(config), ExpertMatrices(config)
        self.shared_experts = LlamaMLP(config, ops, config.n_expert_shared) if config.n_expert_shared else None
        self.active, self.n_expert = config.n_expert_active, config.n_expert
        self.activation, self.ops = activation(config, ops), ops

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(B, T, C) of `x` (B, T, C), and the routing of its tokens."""
        tokens = x.flatten(0, 1)  # (N, C)
        weights, routing = self.gate(tokens)
        of = self.experts
        matrices = of.gate_proj.weight, of.up_proj.weight, of.down_proj.weight
        y = self.ops.experts(tokens, (routing.chosen, weights), matrices, self.activation).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x), routing

    def idle_parameters(self) -> int:
        """Weights of the experts that a token is not routed to."""
        each = sum(p.numel() for p in self.experts.parameters()) // self.n_expert
        return each * (self.n_expert - self.active)


class ExpertsBlock(LlamaBlock):
    """Llama's block with experts; returns their routing too, so that a recomputed block counts nothing twice."""

    mlp_class = ExpertsMLP

    def forward(
        self, x: Tensor, by: Rotation, mask: Any, cache: Cache | None, drop: Dropout = OFF
    ) -> tuple[Tensor, Routing]:
        x = x + drop(self.self_attn(self.input_layernorm(x), by, mask, cache, drop), site=3 * self.layer + 2)
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + drop(y, site=3 * self.layer + 3), routing


class LlamaOfExperts(Llama):
    """Llama with experts in every block."""

    block_class = ExpertsBlock

    @property
    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def idle_parameters(self) -> int:
        return sum(module.idle_parameters() for module in self.modules() if isinstance(module, ExpertsMLP))

    def matmul_parameters(self, *, padded: bool = False) -> int:
        """Those of a token: of its k experts."""
        mixtures = [module for module in self.modules() if isinstance(module, ExpertsMLP)]
        routed = sum(p.numel() for m in mixtures for p in (m.gate.weight, *m.experts.parameters()))
        return super().matmul_parameters(padded=padded) + routed - self.idle_parameters()
