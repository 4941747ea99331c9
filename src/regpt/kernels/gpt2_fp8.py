"""The fused path with the blocks' linear layers multiplied in FP8: formats and scales as in `kernels.fp8`.

Differences to `kernels.gpt2`, which it extends and whose letters it uses:

- Every operand of a product is rounded once, where it is made or right after, and written both by rows (for the product
  that sums along its rows) and by columns (for the weight gradient, which sums over tokens). Bias gradients are summed
  on the way; GELU and its derivative move from the products to the rounding.
- A scale needs a bound of a tensor's largest number before the tensor is rounded, and reading it twice costs as much as
  rounding it. So where a bound follows from the weights and the gradient's longest row (Cauchy and Schwarz: no number
  of x·wᵀ exceeds the longest row of x times the longest row of w), it is used; a bound that is a few powers of two too
  large costs nothing in a floating-point format until numbers fall below its normal range: 2¹⁴ and 2²⁹ below the top of
  e4m3 and e5m2. Only attention's output and its gradient have no such bound, and are read twice.
- The embedding, the head, norms, attention, residuals and loss stay as they are. Losses without gradients, and batches
  whose tokens are no multiple of 16, are computed in bfloat16.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regpt.kernels.config import FP8_MULTIPLE
from regpt.kernels.fp8 import E4M3, E5M2, Rounded
from regpt.kernels.gpt2 import NORM_EPS, BlockState, FusedGPT2
from regpt.model.gpt2 import GPT2, Block
from regpt.model.layers import LayerNorm
from regpt.model.masks import AttentionMask

# Bounds of products grow by the rounding of their operands: e4m3 by up to 2⁻⁴, e5m2 by 2⁻³, sums and bfloat16 by less.
FORWARD_MARGIN = (1 + 2**-4) ** 2 * 1.02
BACKWARD_MARGIN = (1 + 2**-4) * (1 + 2**-3) * 1.02
GELU_SLOPE = 1.13  # the largest derivative of GELU, at 1.4


@dataclass
class Weight8:
    """One matrix (F, C) in FP8, as it is and transposed, (C, F)."""

    rows: Rounded
    columns: Rounded


@dataclass
class Bounds:
    """Bounds that follow from one block's weights, float32 scalars."""

    h_1: Tensor
    h_2: Tensor
    before_gelu: Tensor  # of u and so of GELU(u)
    dbefore: Tensor  # of du, for a dx' whose longest row has length 1


@dataclass
class BlockState8:
    """As `BlockState`; inputs of products are kept only by columns, (C, N) in one byte, for the weights' gradients."""

    x: Tensor
    norm_1: tuple[Tensor, Tensor]
    h_1: Rounded
    qkv: Tensor
    attended: Tensor
    stats: Tensor
    attended_8: Rounded
    x_mid: Tensor
    norm_2: tuple[Tensor, Tensor]
    h_2: Rounded
    before_gelu: Tensor
    after_gelu: Rounded


class FusedGPT2FP8(FusedGPT2):
    """As `FusedGPT2`, of a model whose n_embd is a multiple of 16.

    Args:
        rounding: the module `triton_fp8`, or an object with its functions.
    """

    def __init__(self, model: GPT2, products: Any, attention: Any, between: Any, rounding: Any, **options: Any):
        super().__init__(model, products, attention, between, **options)
        self.rounding = rounding
        layers = [layer for block in self.blocks for layer in layers_of(block)]
        self.weights = {
            layer.weight: Weight8(*rounding.both_ways(*layer.weight.shape, E4M3, model.device)) for layer in layers
        }
        zero = torch.zeros(len(self.blocks), 4, device=model.device)
        self.bounds = {block: Bounds(*row.unbind()) for block, row in zip(self.blocks, zero.unbind())}
        self.longest = zero.new_zeros(())  # length of the longest row of the last dx: bounds its numbers

    def renew_copies(self) -> None:
        super().renew_copies()
        largest = torch._foreach_norm(list(self.weights), math.inf)  # pyright: ignore[reportPrivateImportUsage]
        for (weight, eight), bound in zip(self.weights.items(), largest):
            self.rounding.round_both_ways(weight.detach(), E4M3, bound, out=(eight.rows, eight.columns))
        for block, bounds in self.bounds.items():
            set_bounds(block, bounds)

    def block_forward(
        self, block: Block, x: Tensor, shape: torch.Size, mask: AttentionMask, *, gradient: bool
    ) -> tuple[Tensor, Any]:
        if not gradient or len(x) % FP8_MULTIPLE:
            return super().block_forward(block, x, shape, mask, gradient=gradient)
        attn, mlp, bounds, rounding = block.attn, block.mlp, self.bounds[block], self.rounding
        rows, h_1, norm_1 = rounding.layer_norm(x, block.ln_1.weight, block.ln_1.bias, NORM_EPS, E4M3, bounds.h_1)
        qkv = self.linear_8(rows, attn.c_attn)  # (N, 3·C)
        attended, stats = self.attention.forward(qkv.view(*shape, -1), (attn.n_head, attn.n_head), mask)
        attended = attended.view(x.shape)
        rows, attended_8, _ = rounding.round_both_ways(attended, E4M3, rounding.largest(attended))
        x_mid = self.linear_8(rows, attn.c_proj, residual=x)
        rows, h_2, norm_2 = rounding.layer_norm(x_mid, block.ln_2.weight, block.ln_2.bias, NORM_EPS, E4M3, bounds.h_2)
        before_gelu = self.linear_8(rows, mlp.c_fc)  # (N, 4·C)
        rows, after_gelu, _ = rounding.round_both_ways(before_gelu, E4M3, bounds.before_gelu, form="gelu")
        x_out = self.linear_8(rows, mlp.c_proj, residual=x_mid)
        return x_out, BlockState8(
            x, norm_1, h_1, qkv, attended, stats, attended_8, x_mid, norm_2, h_2, before_gelu, after_gelu
        )  # fmt: skip

    def linear_8(self, x: Rounded, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias + residual, (N, out) in the dtype of activations."""
        bias = self.copies[layer.bias]
        return self.multiply(x, self.weights[layer.weight].rows, bias=bias, epilogue="bias", add=residual)

    def multiply(self, a: Rounded, b: Rounded, out: Tensor | None = None, fast: bool = True, **options: Any) -> Tensor:
        """a (M, K) · bᵀ, b (N, K), times both scales: (M, N). `fast`: summed with fewer bits than float32 has, whose
        noise is far below that of FP8 itself."""
        if out is None:
            out = a.numbers.new_empty(len(a.numbers), len(b.numbers), dtype=self.dtype)
        return self.products(
            a.numbers, b.numbers, out, transpose_b=True, scales=(a.scale, b.scale), fast=fast, **options
        )

    def block_backward(
        self, block: Block, dx: Tensor, state: Any, shape: torch.Size, mask: AttentionMask
    ) -> tuple[Tensor, Tensor]:
        if isinstance(state, BlockState):
            return super().block_backward(block, dx, state, shape, mask)
        attn, mlp, rounding = block.attn, block.mlp, self.rounding
        # The steps of `FusedGPT2.block_backward`; each dz is rounded to e5m2 first, for both of its products.
        dy, columns, _ = rounding.round_both_ways(dx, E5M2, self.longest)
        dafter = self.multiply(dy, self.weights[mlp.c_proj.weight].columns)
        self.weight_gradient_8(columns, state.after_gelu, mlp.c_proj.weight)
        bound = self.longest * self.bounds[block].dbefore  # |du| ≤ ‖dx' row‖ · ‖Wₒ column‖ · max |GELU'|
        dy, columns, sums = rounding.round_both_ways(
            dafter, E5M2, bound, form="dgelu", before=state.before_gelu, sums=True
        )
        self.add_bias_gradient(sums, mlp.c_fc.bias)
        self.weight_gradient_8(columns, state.h_2, mlp.c_fc.weight)
        dh = self.multiply(dy, self.weights[mlp.c_fc.weight].columns)
        dx, sums = self.norm_backward(dh, state.x_mid, block.ln_2, state.norm_2, dx)
        sums = self.finish_sums(sums, block.ln_2, attn.c_proj.bias)
        dy, columns, _ = rounding.round_both_ways(dx, E5M2, self.longest)
        dattended = self.multiply(dy, self.weights[attn.c_proj.weight].columns)
        self.weight_gradient_8(columns, state.attended_8, attn.c_proj.weight)
        given = (t.view(*shape, -1) for t in (dattended, state.qkv, state.attended))
        dqkv = self.attention.backward(*given, state.stats, (attn.n_head, attn.n_head), mask).view(state.qkv.shape)
        dy, columns, sums = rounding.round_both_ways(dqkv, E5M2, rounding.largest(dqkv), sums=True)
        self.add_bias_gradient(sums, attn.c_attn.bias)
        self.weight_gradient_8(columns, state.h_1, attn.c_attn.weight)
        dh = self.multiply(dy, self.weights[attn.c_attn.weight].columns)
        return self.norm_backward(dh, state.x, block.ln_1, state.norm_1, dx)

    def weight_gradient_8(self, dy: Rounded, x: Rounded, weight: Tensor) -> None:
        """dW = dyᵀ·x, from dy (F, N) and x (C, N) by columns, added to `weight.grad` in float32."""
        with self.side(dy.numbers, x.numbers, dy.scale, x.scale):
            grad, add = self.gradient(weight)
            # Not fast: a sum over all tokens needs the bits of float32.
            self.multiply(dy, x, grad, add=grad if add else None, fast=False)

    def add_bias_gradient(self, sums: Tensor, bias: Tensor) -> None:
        with self.side(sums):
            self.between.add_partial_sums(sums, [self.gradient(bias)])

    def norm_backward(
        self, dh: Tensor, x: Tensor, norm: Any, statistics: tuple[Tensor, Tensor], dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.longest = torch.zeros((), dtype=torch.float32, device=dh.device)
        return self.between.layer_norm_backward(dh, x, norm.weight, *statistics, dresidual, longest=self.longest)


def layers_of(block: Block) -> tuple[nn.Linear, ...]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def magnitudes(norm: LayerNorm) -> Tensor:
    """Magnitudes of a norm's biases, which every model on the fused path has."""
    assert norm.bias is not None
    return norm.bias.abs()


def set_bounds(block: Block, bounds: Bounds) -> None:
    """Renew `bounds`: the squares of a normalised row sum to C, so its length is √C and no number exceeds that."""
    root = math.sqrt(block.ln_1.weight.numel())
    for norm, bound in ((block.ln_1, bounds.h_1), (block.ln_2, bounds.h_2)):
        bound.copy_(root * norm.weight.abs().max() + magnitudes(norm).max())
    layer, norm = block.mlp.c_fc, block.ln_2
    longest = root * (layer.weight * norm.weight).norm(dim=1) + layer.weight.abs() @ magnitudes(norm)
    bounds.before_gelu.copy_((FORWARD_MARGIN * longest + layer.bias.abs()).max())
    bounds.dbefore.copy_(BACKWARD_MARGIN * GELU_SLOPE * block.mlp.c_proj.weight.norm(dim=0).max())
