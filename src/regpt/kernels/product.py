"""Products of rows with weights on NVIDIA GPUs: of weights in Q8_0, and such that the bits of a row depend on it alone.

cuBLAS adds up in an order that depends on the number of rows. Here every element is one sum, in one order, whatever is
in the batch (He et al. 2025, "Defeating nondeterminism in LLM inference").
"""
# pyright: reportIndexIssue=false

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from regpt.kernels.few_rows import GROUP
from regpt.kernels.triton_ops import rms_norm

BLOCK_M, BLOCK_K, WARPS, STAGES = 64, 64, 4, 4  # one tile of rows, so that few rows and many take the same instructions
NARROW, WIDE = 32, 128  # columns of a tile: of few rows, and of many or of a head
MANY_COLUMNS = 16384


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, M, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) · weightᵀ + bias; weight (N, K), where GROUP is not 0 int8 with a scale for each GROUP."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = m.to(tl.int64)[:, None] * K, n.to(tl.int64)[:, None] * K
    real, inside = (m < M)[:, None], (n < N)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_ptr + row + k, mask=real & (k < K), other=0.0)  # (BLOCK_M, BLOCK_K)
        weight = tl.load(weight_ptr + column + k, mask=inside & (k < K), other=0.0)  # (BLOCK_N, BLOCK_K)
        if GROUP:
            group = (start // GROUP + tl.arange(0, BLOCK_K // GROUP))[None, :]
            scale = tl.load(scale_ptr + column // GROUP + group, mask=inside & (group < K // GROUP), other=0.0)
            parts = weight.reshape(BLOCK_N, BLOCK_K // GROUP, GROUP).to(tl.float32) * scale.to(tl.float32)[:, :, None]
            weight = parts.reshape(BLOCK_N, BLOCK_K).to(x.dtype)
        total = tl.dot(x, tl.trans(weight), total)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=real & (n < N)[None, :])


def multiply_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x (..., K) · weightᵀ + bias, (..., N) in `out_dtype`, default that of x, in half precision.

    Args:
        weight: (N, K), in the dtype of x; int8 with `scales` (N, K / 32) float16, whose products are rounded to it.
    """
    N, K = weight.shape
    rows = x.reshape(-1, K).contiguous()
    M = len(rows)
    y = torch.empty(M, N, device=x.device, dtype=out_dtype or x.dtype)
    columns = WIDE if M > BLOCK_M or N > MANY_COLUMNS else NARROW
    sizes = {"K": K, "BLOCK_M": BLOCK_M, "BLOCK_N": columns, "BLOCK_K": BLOCK_K}
    product_kernel[(triton.cdiv(N, columns), triton.cdiv(M, BLOCK_M))](
        rows, weight, scales, bias, y, M, N, **sizes, GROUP=0 if scales is None else GROUP, BIAS=bias is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y.view(*x.shape[:-1], N)


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` of each row by itself: torch's mean adds up in an order that depends on the number of rows."""
    return rms_norm(x.reshape(-1, x.size(-1)).contiguous(), weight, eps)[0].view(x.shape)
