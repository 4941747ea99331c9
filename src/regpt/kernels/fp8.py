"""Linear layers that multiply in FP8 while training (Micikevicius et al. 2022, "FP8 Formats for Deep Learning").

Activations and weights are e4m3, whose three bits of mantissa round by up to 1/16; gradients of outputs are e5m2, with
more range and half the precision (their section 3). Each tensor is scaled by its current maximum before rounding;
products are summed in float32 (on Hopper the forward's with fewer bits: `use_fast_accum`). There is no history of
maxima and so no state: a resumed run and another micro-batch need nothing but the tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regpt.kernels.config import FP8_MULTIPLE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The power of two that a tensor's maximum gets: one binade below the last, so that the maximum (up to twice this)
# never exceeds 448 and 57,344, the largest finite numbers (Micikevicius et al. 2022, table 1).
TOP = {E4M3: 2.0**7, E5M2: 2.0**14}
SMALLEST_MAXIMUM = 2.0**-90  # of a tensor of zeros; the product of two scales stays a normal float32
EXPONENT_BITS = 0x7F800000  # of float32
LEAST_CAPABILITY = (8, 9)  # Ada; then Hopper and later


@dataclass
class Rounded:
    """A matrix in FP8: `numbers` times `scale`, a float32 scalar, a power of two."""

    numbers: Tensor
    scale: Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, C) · weightᵀ (C, F) + bias (F,), as `model.ops.linear`, all three products of a training step in FP8.

    Without gradients, or for sizes that are not multiples of 16, it is the plain layer: validation, sampling and tasks
    measure the weights, not this rounding.

    Returns:
        (…, F) bfloat16 where computed in FP8; gradients have the types of `x`, `weight` and `bias`.
    """
    if not torch.is_grad_enabled() or not suits(x, weight):
        return F.linear(x, weight, bias)
    x = x.to(torch.bfloat16)  # as autocast does: a norm's float32 result would be read and written twice as wide
    y: Any = LinearFP8.apply(x.flatten(0, -2), weight, bias)  # (N, F)
    return y.view(*x.shape[:-1], -1)


def suits(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.size(-1)
    return all(n % FP8_MULTIPLE == 0 for n in (rows, *weight.shape))


class LinearFP8(torch.autograd.Function):
    """x (N, C), weight (F, C), bias (F,) → (N, F); N, C, F multiples of 16. The backward keeps one byte a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8, x_scale = quantized(x, E4M3)
        w8, w_scale = quantized(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        added = None if bias is None else bias.to(torch.bfloat16)
        return product(x8, w8, x_scale, w_scale, torch.bfloat16, bias=added, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype, b_dtype = ctx.dtypes
        dy8, dy_scale = quantized(dy, E5M2)  # (N, F)
        dx = product(dy8, transposed(w8), dy_scale, w_scale, torch.bfloat16)  # (N, C)
        dw = product(transposed(dy8), transposed(x8), dy_scale, x_scale, torch.float32)  # (F, C)
        db = None if b_dtype is None else dy.sum(0, dtype=torch.float32).to(b_dtype)
        return dx.to(x_dtype), dw.to(w_dtype), db


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` (n, m) over its scale, rounded to `dtype`, and the scale, a power of two: scaling itself rounds nothing.

    A number that is not finite makes the scale infinite and the products not finite: errors are not hidden.
    """
    # Row by row first: a compiler can do that where it makes the rows. Of abs(): maxima are exact in every type.
    largest = x.detach().abs().amax(1).amax().float().clamp(min=SMALLEST_MAXIMUM)
    floor = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # the power of two at or below
    return (x * (TOP[dtype] / floor)).to(dtype).contiguous(), floor / TOP[dtype]  # exact in bfloat16, too


def transposed(x8: Tensor) -> Tensor:
    return x8.t().contiguous()


def product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """a (n, k) · bᵀ, b (m, k), times both scales → (n, m). Hopper's tensor cores need k contiguous in both operands of
    FP8, so products that sum over N in the backward transpose theirs first."""
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]  (nothing public multiplies float8)
    return multiply(a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def obstacle(device: torch.device) -> str | None:
    """Why `device` cannot train in FP8, tried on a small layer; None when it can."""
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"FP8 needs compute capability 8.9 or more, {name} has {major}.{minor}"
    try:
        error = error_of_linear(device)
    except (RuntimeError, TypeError, AttributeError) as failure:  # PyTorch raises any of them for unsupported FP8
        return f"PyTorch {torch.__version__} does not multiply FP8 on {device.type} ({str(failure).splitlines()[0]})"
    if not error <= LARGEST_ERROR:  # "not <=": NaN fails too
        return f"a product in FP8 on {device.type} is wrong by {error:.0%}"
    return None


SIZE, LARGEST_ERROR = 64, 0.1  # relative, of normally distributed numbers: e5m2 gives about 5 %


def error_of_linear(device: torch.device) -> float:
    """The largest relative error of the output and the gradients of a small layer, against float64."""
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(SIZE, SIZE, generator=draw) for _ in range(3))
    given = [z.to(device).requires_grad_() for z in (x, weight, torch.zeros(SIZE))]
    with torch.enable_grad():
        y = linear(*given)
        gradients = torch.autograd.grad(y, given[:2], dy.to(device, y.dtype))
    x, weight, dy = (z.double() for z in (x, weight, dy))
    exact = (x @ weight.t(), dy @ weight, dy.t() @ x)
    found = (z.detach().cpu().double() for z in (y, *gradients))
    return max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, exact))
