"""Llama's loss and its gradients as one hand-written function: the fast version of `model.llama` and of the head.

Products, head and gradients of weights: `kernels.fused`.

- One product computes queries, keys and values, another gate and up: their weights' copies are one matrix each, and
  their gradients, too.
- The residual stream is bfloat16; each residual is added in the epilogue of the product that computes the other
  summand, before rounding. (Under autocast the plain path keeps the stream in float32.)
- Queries and keys are rotated in place; SwiGLU and its derivative read and write each number once; RMSNorm's backward
  also adds the residual's gradient.

One block, row by row (N = B·T rows; H query heads, G of keys and values, of D; shapes: the glossary in `regpt.model`):

    h₁ = RMS₁(x)   q, k, v = h₁·Wᵀ   q, k = rotate(q, k)      y = attention(q, k, v)   m = x + y·Wₒᵀ
    h₂ = RMS₂(m)   a, u = h₂·W_guᵀ   g = silu(a) ∘ u                                   x' = m + g·W_dᵀ

With dz for ∂loss/∂z, a product z = a·Wᵀ has da = dz·W and dW = dzᵀ·a; a rotation's gradient is rotated back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regpt.kernels.fused import FusedLoss
from regpt.model import layers
from regpt.model.layers import Rotation
from regpt.model.llama import Llama, LlamaBlock
from regpt.model.masks import AttentionMask


@dataclass
class LlamaBlockState:
    """Activations of one block saved for its backward: (N, …) in bfloat16, 1/root mean squares (N,) in float32."""

    x: Tensor
    rstd_1: Tensor
    h_1: Tensor
    qkv: Tensor  # (N, (H + 2·G)·D), rotated
    attended: Tensor  # y
    stats: Tensor  # softmax statistics, in the form that the attention backend returned
    x_mid: Tensor  # m
    rstd_2: Tensor
    h_2: Tensor
    gate_up: Tensor  # a and u, (N, 2·I)
    gated: Tensor  # g


@dataclass
class LlamaState:
    """Activations of one micro-batch; the backward drops each after its last use, to free memory early."""

    idx: Tensor
    by: Rotation
    mask: AttentionMask
    blocks: list[LlamaBlockState]
    x: Tensor  # input of the last norm; then its output and 1/root mean square
    h: Tensor | None
    rstd: Tensor
    head: tuple[Tensor, ...]  # of `head_forward`


class FusedLlama(FusedLoss):
    """The loss of `model`, a Llama on one CUDA device with float32 weights; arguments as in `FusedLoss`."""

    model: Llama

    def matmul_weights(self) -> list[list[Tensor]]:
        groups: list[list[Tensor]] = [[self.model.head_weight]]
        for block in self.blocks:
            groups += [list(qkv_weights(block)), [block.self_attn.o_proj.weight]]
            groups += [[block.mlp.gate_proj.weight, block.mlp.up_proj.weight], [block.mlp.down_proj.weight]]
        return groups

    def forward(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, LlamaState]:
        """Return the loss and the state for `backward`, which is valid only with `gradient`."""
        model, mask = self.model, AttentionMask(documents=cu_seqlens)
        x = self.between.embed(idx, None, model.embed_tokens.weight, None, self.dtype)  # (N, C)
        at = torch.arange(idx.size(1), device=idx.device) if positions is None else positions
        by = layers.rotation(model.shape, at)
        states = []
        for block in self.blocks:
            x, state = self.block_forward(block, x, idx.shape, by, mask)
            states += [state] if gradient else []
        h, rstd = self.between.rms_norm(x, model.norm.weight, model.norm.eps)
        loss, head = self.head_forward(h, targets, gradient=gradient)
        return loss, LlamaState(idx, by, mask, states, x, h, rstd, head)

    def block_forward(
        self, block: LlamaBlock, x: Tensor, shape: torch.Size, by: Rotation, mask: AttentionMask
    ) -> tuple[Tensor, LlamaBlockState]:
        """Return the block's output (N, C) and the state for `block_backward`."""
        attn, mlp, between = block.self_attn, block.mlp, self.between
        norm_1, norm_2, heads = block.input_layernorm, block.post_attention_layernorm, self.heads
        h_1, rstd_1 = between.rms_norm(x, norm_1.weight, norm_1.eps)
        qkv = self.multiply(h_1, attn.q_proj.weight)  # (N, (H + 2·G)·D)
        between.rotate(qkv, *by, attn.head_size, sum(heads))
        attended, stats = self.attention.forward(qkv.view(*shape, -1), heads, mask)
        attended = attended.view(len(x), -1)
        x_mid = self.multiply(attended, attn.o_proj.weight, add=x)
        h_2, rstd_2 = between.rms_norm(x_mid, norm_2.weight, norm_2.eps)
        gate_up = self.multiply(h_2, mlp.gate_proj.weight)  # (N, 2·I)
        gated = between.swiglu(gate_up)
        x_out = self.multiply(gated, mlp.down_proj.weight, add=x_mid)
        return x_out, LlamaBlockState(x, rstd_1, h_1, qkv, attended, stats, x_mid, rstd_2, h_2, gate_up, gated)

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return self.model.shape.n_head, self.model.shape.n_kv_head

    def multiply(self, x: Tensor, weight: Tensor, *, add: Tensor | None = None) -> Tensor:
        """x · Wᵀ + add of the weights of which `weight` is the first, (N, out)."""
        joined = self.joined[weight]
        return self.products(x, joined, x.new_empty(len(x), len(joined)), transpose_b=True, add=add)

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy · W, the gradient of the input of `multiply`."""
        joined = self.joined[weight]
        return self.products(dy, joined, dy.new_empty(len(dy), joined.size(1)))

    def backward(self, scale: Tensor, state: LlamaState) -> None:
        """Add `scale` times the gradient of the summed loss to every parameter's `.grad`; consumes `state`."""
        model = self.model
        adding = self.adding()
        dh = self.head_backward(scale, state)
        dx = self.norm_backward(dh, state.x, model.norm, state.rstd, None)
        self.side.join()  # frees the largest tensor, before the blocks allocate
        for block in reversed(self.blocks):
            dx = self.block_backward(block, dx, state.blocks.pop(), state)
            self.side.join_previous()  # bounds the memory that the side stream holds, without draining it
        with self.side():  # after the head's product, which has written the gradient of a tied weight
            dembedding, add = self.gradient(model.embed_tokens.weight)
            if not add:
                dembedding.zero_()  # `embed_backward` only adds
            self.between.embed_backward(dx, state.idx, None, dembedding, None)
        self.side.join()
        if adding:
            self.note_warm(state.idx, state.mask)

    def block_backward(self, block: LlamaBlock, dx: Tensor, kept: LlamaBlockState, state: LlamaState) -> Tensor:
        """Return the gradient of the block's input x; `dx` is that of its output x'.

        Each weight gradient is launched on the side stream as soon as its operands exist, but after the product on the
        critical path, so that it fills gaps of the kernels that follow.
        """
        attn, mlp, between = block.self_attn, block.mlp, self.between
        dgated = self.input_gradient(dx, mlp.down_proj.weight)
        self.weight_gradient(dx, kept.gated, mlp.down_proj.weight)
        dgate_up = between.swiglu_backward(dgated, kept.gate_up)
        dh = self.input_gradient(dgate_up, mlp.gate_proj.weight)
        self.weight_gradient(dgate_up, kept.h_2, mlp.gate_proj.weight, mlp.up_proj.weight)
        # x' = m + …, so dm = dx' + the norm's part; m = x + …, so dx = dm + the norm's part.
        dx = self.norm_backward(dh, kept.x_mid, block.post_attention_layernorm, kept.rstd_2, dx)
        dattended = self.input_gradient(dx, attn.o_proj.weight)
        self.weight_gradient(dx, kept.attended, attn.o_proj.weight)
        operands = (t.view(*state.idx.shape, -1) for t in (dattended, kept.qkv, kept.attended))  # (B, T, …)
        dqkv = self.attention.backward(*operands, kept.stats, self.heads, state.mask).view(kept.qkv.shape)
        between.rotate(dqkv, *state.by, attn.head_size, sum(self.heads), back=True)
        dh = self.input_gradient(dqkv, attn.q_proj.weight)
        self.weight_gradient(dqkv, kept.h_1, *qkv_weights(block))
        return self.norm_backward(dh, kept.x, block.input_layernorm, kept.rstd_1, dx)

    def norm_backward(self, dh: Tensor, x: Tensor, norm: Any, rstd: Tensor, dresidual: Tensor | None) -> Tensor:
        """Return the gradient of the norm's input x plus `dresidual`; add its weight's gradient on the side stream."""
        dx, sums = self.between.rms_norm_backward(dh, x, norm.weight, rstd, dresidual)
        with self.side(sums):
            self.between.add_partial_sums(sums, [self.gradient(norm.weight)])
        return dx


def qkv_weights(block: LlamaBlock) -> tuple[Tensor, ...]:
    attn = block.self_attn
    return attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
