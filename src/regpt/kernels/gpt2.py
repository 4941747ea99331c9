"""GPT-2's loss and its gradients as one hand-written function: the fast version of `Transformer.hidden` and
`linear_cross_entropy`.

Products, head and gradients of weights: `kernels.fused`.

- The residual stream is bfloat16; each residual is added in the epilogue of the product that computes the other
  summand, before rounding. (Under autocast the plain path keeps the stream in float32.)
- GELU and its derivative are epilogues of products; LayerNorm's backward also adds the residual's gradient and sums the
  bias gradient of the product before it.

One block, row by row (N = B·T rows; shapes: the glossary in `regpt.model`):

    h₁ = LN₁(x)   qkv = h₁·Wₐᵀ + bₐ   y = attention(qkv)   m = x + y·Wₚᵀ + bₚ
    h₂ = LN₂(m)   u = h₂·W_fᵀ + b_f   g = GELU(u)          x' = m + g·Wₒᵀ + bₒ

With dz for ∂loss/∂z, a product z = a·Wᵀ + b has da = dz·W, dW = dzᵀ·a and db = Σₙ dz. No other kernel needs a db: it
runs on the side stream, as dW does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regpt.kernels.fused import FusedLoss
from regpt.model.gpt2 import GPT2, Block, CausalSelfAttention
from regpt.model.masks import AttentionMask

NORM_EPS = 1e-5  # the value in OpenAI's code


@dataclass
class BlockState:
    """Activations of one block saved for its backward: (N, …) in bfloat16, statistics of norms (N,) in float32."""

    x: Tensor
    norm_1: tuple[Tensor, Tensor]  # mean and 1/standard deviation of each row
    h_1: Tensor
    qkv: Tensor
    attended: Tensor  # y
    stats: Tensor  # softmax statistics, in the form that the attention backend returned
    x_mid: Tensor  # m
    norm_2: tuple[Tensor, Tensor]
    h_2: Tensor
    before_gelu: Tensor  # u
    after_gelu: Tensor  # g


@dataclass
class ForwardState:
    """Activations of one micro-batch; the backward drops each after its last use, to free memory early."""

    idx: Tensor
    positions: Tensor | None
    mask: AttentionMask
    blocks: list[BlockState]
    x: Tensor  # input of the last norm; then its output, mean and 1/standard deviation
    h: Tensor | None
    norm: tuple[Tensor, Tensor]
    head: tuple[Tensor, ...]  # of `head_forward`


class FusedGPT2(FusedLoss):
    """The loss of `model`, a GPT-2 on one CUDA device with float32 weights; arguments as in `FusedLoss`."""

    model: GPT2

    def matmul_weights(self) -> list[list[Tensor]]:
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        return [[self.model.wte.weight], *([p] for layer in layers for p in layer.parameters())]

    def forward(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, ForwardState]:
        """Return the loss and the state for `backward`, which is valid only with `gradient`."""
        model, mask = self.model, AttentionMask(documents=cu_seqlens)
        x = self.between.embed(idx, positions, model.wte.weight, model.wpe.weight, self.dtype)  # (N, C)
        states = []
        for block in self.blocks:
            x, state = self.block_forward(block, x, idx.shape, mask, gradient=gradient)
            states += [state] if gradient else []
        h, norm = self.between.layer_norm(x, model.ln_f.weight, model.ln_f.bias, NORM_EPS)
        loss, head = self.head_forward(h, targets, gradient=gradient)
        return loss, ForwardState(idx, positions, mask, states, x, h, norm, head)

    def block_forward(
        self, block: Block, x: Tensor, shape: torch.Size, mask: AttentionMask, *, gradient: bool
    ) -> tuple[Tensor, BlockState]:
        """Return the block's output (N, C) and the state for `block_backward`; only `FusedGPT2FP8` uses `gradient`."""
        attn, mlp = block.attn, block.mlp
        h_1, norm_1 = self.between.layer_norm(x, block.ln_1.weight, block.ln_1.bias, NORM_EPS)
        qkv = self.linear(h_1, attn.c_attn)  # (N, 3·C)
        attended, stats = self.attention.forward(qkv.view(*shape, -1), (attn.n_head, attn.n_head), mask)
        attended = attended.view(x.shape)
        x_mid = self.linear(attended, attn.c_proj, residual=x)
        h_2, norm_2 = self.between.layer_norm(x_mid, block.ln_2.weight, block.ln_2.bias, NORM_EPS)
        before_gelu, after_gelu = (h_2.new_empty(len(x), mlp.c_fc.out_features) for _ in range(2))
        weight, bias = self.copies[mlp.c_fc.weight], self.copies[mlp.c_fc.bias]
        self.products(h_2, weight, after_gelu, transpose_b=True, epilogue="gelu_aux_bias", bias=bias, aux=before_gelu)
        x_out = self.linear(after_gelu, mlp.c_proj, residual=x_mid)
        state = BlockState(
            x, norm_1, h_1, qkv, attended, stats, x_mid, norm_2, h_2, before_gelu, after_gelu
        )  # fmt: skip
        return x_out, state

    def linear(self, x: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias + residual, (N, out)."""
        out = x.new_empty(len(x), layer.out_features)
        weight, bias = self.copies[layer.weight], self.copies[layer.bias]
        return self.products(x, weight, out, transpose_b=True, epilogue="bias", bias=bias, add=residual)

    def backward(self, scale: Tensor, state: ForwardState) -> None:
        """Add `scale` times the gradient of the summed loss to every parameter's `.grad`; consumes `state`."""
        model = self.model
        adding = self.adding()
        dh = self.head_backward(scale, state)
        dx, sums = self.norm_backward(dh, state.x, model.ln_f, state.norm, None)
        self.side.join()  # frees dlogits, the largest tensor, before the blocks allocate
        above: Any = model.ln_f  # the norm that read the output of the block at hand
        for block in reversed(self.blocks):
            # `dx` is now the gradient of this block's output x', and the norm above has left Σₙ dx' in `sums`: that is
            # the gradient of bₒ, without another pass over dx.
            self.finish_sums(sums, above, block.mlp.c_proj.bias)
            dx, sums = self.block_backward(block, dx, state.blocks.pop(), state.idx.shape, state.mask)
            self.side.join_previous()  # bounds the memory that the side stream holds, without draining it
            above = block.ln_1
        self.finish_sums(sums, above, None)  # the first block's input is the embedding, which has no bias
        # On the side stream, after the head's product, which has written the gradient of the tied weight.
        with self.side():
            dwpe, add = self.gradient(model.wpe.weight)
            if not add:
                dwpe.zero_()  # `embed_backward` only adds
            self.between.embed_backward(dx, state.idx, state.positions, self.gradient(model.wte.weight)[0], dwpe)
        self.side.join()
        if adding:
            self.note_warm(state.idx, state.mask)

    def block_backward(
        self, block: Block, dx: Tensor, state: BlockState, shape: torch.Size, mask: AttentionMask
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the block's input x and the partial sums of LN₁; `dx` is that of its output x'.

        Each weight gradient is launched on the side stream as soon as its operands exist, but after the product on the
        critical path, so that it fills gaps of the kernels that follow.
        """
        attn, mlp = block.attn, block.mlp
        # MLP: du = (dx'·Wₒ) ∘ GELU'(u) in one product, then dh₂ = du·W_f.
        dbefore = torch.empty_like(state.before_gelu)  # du
        weight = self.copies[mlp.c_proj.weight]
        self.products(dx, weight, dbefore, epilogue="dgelu", aux=state.before_gelu)
        self.weight_gradient(dx, state.after_gelu, mlp.c_proj.weight)
        with self.side(dbefore):
            self.between.add_column_sums(dbefore, *self.gradient(mlp.c_fc.bias))
        self.weight_gradient(dbefore, state.h_2, mlp.c_fc.weight)
        dh = self.products(dbefore, self.copies[mlp.c_fc.weight], torch.empty_like(dx))
        # x' = m + …, so dm = dx' + LN₂'s part, in one kernel, which also leaves Σₙ dm, the gradient of bₚ, in `sums`.
        dx, sums = self.norm_backward(dh, state.x_mid, block.ln_2, state.norm_2, dx)
        sums = self.finish_sums(sums, block.ln_2, attn.c_proj.bias)
        # Attention: dy = dm·Wₚ, then dqkv, then dh₁ = dqkv·Wₐ. m = x + …, so dx = dm + LN₁'s part.
        dattended = self.products(dx, self.copies[attn.c_proj.weight], torch.empty_like(dx))
        self.weight_gradient(dx, state.attended, attn.c_proj.weight)
        operands = (t.view(*shape, -1) for t in (dattended, state.qkv, state.attended))  # (B, T, …)
        dqkv = self.attention.backward(*operands, state.stats, (attn.n_head, attn.n_head), mask).view(state.qkv.shape)
        self.attention_bias_gradient(dqkv, sums, attn)
        self.weight_gradient(dqkv, state.h_1, attn.c_attn.weight)
        dh = self.products(dqkv, self.copies[attn.c_attn.weight], torch.empty_like(dx))
        return self.norm_backward(dh, state.x, block.ln_1, state.norm_1, dx)

    def norm_backward(
        self, dh: Tensor, x: Tensor, norm: Any, statistics: tuple[Tensor, Tensor], dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the norm's input x plus `dresidual`, and partial column sums for `finish_sums`.

        The partial sums (P, 3, C) are of the gradients of the norm's weight and bias, and of the returned gradient.
        """
        return self.between.layer_norm_backward(dh, x, norm.weight, *statistics, dresidual)

    def attention_bias_gradient(self, dqkv: Tensor, sums: Tensor, attn: CausalSelfAttention) -> None:
        """Add the gradients of the query, key and value parts of bₐ; only the queries' reads dqkv.

        Keys: b shifts all scores q·(k + b) of a query by the same q·b, which softmax ignores, so the gradient is 0.
        Values: the attention probabilities of a query sum to 1, so y gains b, and db = Σₙ dy = (Σₙ dm)·Wₚ, where the
        backward of LN₂ has left partial sums of dm in `sums[:, 2]`.
        """
        C = attn.c_proj.in_features
        with self.side(dqkv, sums):
            grad, add = self.gradient(attn.c_attn.bias)
            if not add:
                grad.zero_()  # nothing is added to the keys' part
            self.between.add_column_sums(dqkv[:, :C], grad[:C], add=True)
            grad[2 * C :].addmv_(attn.c_proj.weight.T, sums[:, 2].sum(0))

    def finish_sums(self, sums: Tensor, norm: Any, bias_before: Tensor | None) -> Tensor:
        """Reduce partial sums of `norm_backward` to the gradients of the norm's weight and bias and of `bias_before`,
        the bias of the product that computed the norm's input; return fewer partial sums, for another reduction.
        """
        outs = [norm.weight, norm.bias] + ([] if bias_before is None else [bias_before])
        with self.side(sums):
            return self.between.add_partial_sums(sums, [self.gradient(p) for p in outs])
