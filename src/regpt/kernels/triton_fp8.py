"""Rounding to FP8, in Triton: each tensor is read once and written twice, by rows and by columns.

Hopper multiplies FP8 only where the numbers that are summed are contiguous in both operands. A product of the forward
and of the backward sums along rows, the gradient of a weight along columns (over tokens), so each operand is needed
both ways. The functions that make an operand (LayerNorm, GELU and its derivative) are part of the rounding, in
float32. Scales are those of `kernels.fp8`: powers of two, from a bound of the tensor's largest number. Rows are tokens
(N = B·T of them); every kernel runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""
# pyright: reportIndexIssue=false

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from regpt.kernels.fp8 import E4M3, E5M2, TOP, Rounded, quantized
from regpt.kernels.triton_ops import multiprocessors

ROWS, COLUMNS, WARPS = 64, 128, 4  # what one program rounds
NORM_ROWS, NORM_COLUMNS, NORM_WARPS = 32, 256, 8
LARGEST_ROWS, LARGEST_COLUMNS = 64, 128
LARGEST_PROGRAMS = 8  # for each multiprocessor


@triton.jit
def scales(bound_ptr, TOP: tl.constexpr):
    """1/scale and scale: the bound's power of two becomes 2**TOP. Made of bits, as a division need not be exact."""
    least = 8.077935669463161e-28  # 2⁻⁹⁰, `fp8.SMALLEST_MAXIMUM`
    bound = tl.maximum(tl.load(bound_ptr), least, propagate_nan=tl.PropagateNan.ALL)
    exponent = bound.to(tl.int32, bitcast=True) & 0x7F800000  # of float32, in place
    floor = exponent.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return inverse * (1 << TOP), floor * (1.0 / (1 << TOP))  # not finite if the bound is not


@triton.jit
def bytes_of(x, TOP: tl.constexpr, PTX: tl.constexpr):
    """x in FP8, as uint8. One number at a time: of two that are rounded together and stored twice, by rows and by
    columns, the assembler that Triton brings for Hopper loses some (triton-lang/triton, issue 11111)."""
    if not PTX:
        rounded = x.to(tl.float8e4nv if TOP == 7 else tl.float8e5).to(tl.uint8, bitcast=True)
    elif TOP == 7:
        asm: tl.constexpr = "{.reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, 0f00000000, $1; cvt.u32.u16 $0, t;}"
        rounded = tl.inline_asm_elementwise(asm, "=r,f", [x], dtype=tl.uint32, is_pure=True, pack=1).to(tl.uint8)
    else:
        asm: tl.constexpr = "{.reg .b16 t; cvt.rn.satfinite.e5m2x2.f32 t, 0f00000000, $1; cvt.u32.u16 $0, t;}"
        rounded = tl.inline_asm_elementwise(asm, "=r,f", [x], dtype=tl.uint32, is_pure=True, pack=1).to(tl.uint8)
    return rounded


@triton.jit
def store_both_ways(rounded, rows_ptr, columns_ptr, row, column, N, M):
    """rounded (ROWS, COLUMNS) to rows (N, M) and to columns (M, N)."""
    inside = (row[:, None] < N) & (column[None, :] < M)
    tl.store(rows_ptr + row[:, None].to(tl.int64) * M + column[None, :], rounded, mask=inside)
    inside = (column[:, None] < M) & (row[None, :] < N)
    tl.store(columns_ptr + column[:, None].to(tl.int64) * N + row[None, :], tl.trans(rounded), mask=inside)


@triton.jit
def round_kernel(
    x_ptr, before_ptr, bound_ptr, rows_ptr, columns_ptr, scale_ptr, partial_ptr, N, M,
    FORM: tl.constexpr, SUMS: tl.constexpr, TOP: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None].to(tl.int64) * M + column[None, :]
    inside = (row[:, None] < N) & (column[None, :] < M)
    inverse, scale = scales(bound_ptr, TOP)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if FORM != "plain":  # GELU(tanh) z = z · sigmoid(2·√(2/π)·(z + 0.044715·z³))
        z = x if FORM == "gelu" else tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        if FORM == "gelu":
            x = z * sigmoid
        else:
            x *= sigmoid + z * sigmoid * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    if SUMS:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M + column, tl.sum(x, 0), mask=column < M)
    store_both_ways(bytes_of(x * inverse, TOP, PTX), rows_ptr, columns_ptr, row, column, N, M)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr, scale)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, bound_ptr, rows_ptr, columns_ptr, scale_ptr, mean_ptr, rstd_ptr, N, eps,
    C: tl.constexpr, TOP: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_ptr += row[:, None].to(tl.int64) * C
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, C, COLUMNS):  # from memory; again, twice, from the cache
        column = first + tl.arange(0, COLUMNS)
        inside = (row[:, None] < N) & (column[None, :] < C)
        total += tl.load(x_ptr + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / C
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row[:, None] < N) & (column[None, :] < C)
        x = tl.load(x_ptr + column[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(column[None, :] < C, x - mean[:, None], 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, 1) / C + eps)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)
    inverse, scale = scales(bound_ptr, TOP)
    for first in range(0, C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row[:, None] < N) & (column[None, :] < C)
        x = tl.load(x_ptr + column[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        h = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        store_both_ways(bytes_of(h * inverse, TOP, PTX), rows_ptr, columns_ptr, row, column, N, C)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


@triton.jit
def largest_kernel(x_ptr, largest_ptr, N, M, rows_each, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * rows_each
    end = tl.minimum(start + rows_each, N)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < end) & (column[None, :] < M)
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * M + column[None, :], mask=inside, other=0.0)
        found = tl.maximum(found, tl.abs(x.to(tl.float32)))
    tl.atomic_max(largest_ptr, tl.max(tl.max(found, 1), 0), sem="relaxed")


def both_ways(N: int, M: int, dtype: torch.dtype, device: torch.device) -> tuple[Rounded, Rounded]:
    scale = torch.empty((), dtype=torch.float32, device=device)
    rows, columns = (torch.empty(shape, dtype=dtype, device=device) for shape in ((N, M), (M, N)))
    return Rounded(rows, scale), Rounded(columns, scale)


def round_both_ways(
    x: Tensor,
    dtype: torch.dtype,
    bound: Tensor,
    *,
    form: str = "plain",
    before: Tensor | None = None,
    sums: bool = False,
    out: tuple[Rounded, Rounded] | None = None,
) -> tuple[Rounded, Rounded, Tensor | None]:
    """x (N, M), or GELU of it, rounded to `dtype` over a scale: as it is (N, M), and transposed (M, N).

    Args:
        bound: float32 scalar, at least the largest absolute value that is rounded.
        form: plain; gelu: GELU(tanh) of x; dgelu: x times the derivative of GELU at `before` (N, M).
        sums: also return partial sums of the columns, taken before rounding: (P, 1, M) float32, for
            `triton_ops.add_partial_sums`.
        out: memory to write to.
    """
    assert x.is_contiguous()
    assert before is None or before.is_contiguous()
    N, M = x.shape
    rows, columns = out or both_ways(N, M, dtype, x.device)
    programs = triton.cdiv(N, ROWS)
    partial = torch.empty(programs, 1, M, dtype=torch.float32, device=x.device) if sums else None
    round_kernel[(triton.cdiv(M, COLUMNS), programs)](
        x, before, bound, *pointers(rows, columns), partial, N, M,
        FORM=form, SUMS=sums, TOP=exponent(dtype), PTX=x.is_cuda, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return rows, columns, partial


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, bound: Tensor
) -> tuple[Rounded, Rounded, tuple[Tensor, Tensor]]:
    """LayerNorm of x (N, C), rounded as `round_both_ways` does; and mean and 1/standard deviation, (N,) float32."""
    assert x.is_contiguous()
    N, C = x.shape
    rows, columns = both_ways(N, C, dtype, x.device)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    layer_norm_kernel[(triton.cdiv(N, NORM_ROWS),)](
        x, weight, bias, bound, *pointers(rows, columns), mean, rstd, N, eps,
        C=C, TOP=exponent(dtype), PTX=x.is_cuda, ROWS=NORM_ROWS, COLUMNS=NORM_COLUMNS, num_warps=NORM_WARPS,
    )  # fmt: skip
    return rows, columns, (mean, rstd)


def largest(x: Tensor) -> Tensor:
    """max |x| of x (N, M), a float32 scalar."""
    assert x.is_contiguous()
    N, M = x.shape
    found = torch.zeros((), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(M, LARGEST_COLUMNS)
    programs = triton.cdiv(multiprocessors(x.device) * LARGEST_PROGRAMS, blocks)
    largest_kernel[(blocks, programs)](
        x, found, N, M, triton.cdiv(N, programs), ROWS=LARGEST_ROWS, COLUMNS=LARGEST_COLUMNS, num_warps=4
    )
    return found


def obstacle(device: torch.device, C: int) -> str | None:
    """Why these kernels cannot be used on `device` for norms of C numbers, found by a trial; None when they can.

    An assembler that mixes up bytes (see `bytes_of`) raises no error: only the stored numbers show it.
    """
    draw = torch.Generator().manual_seed(0)
    x, before = (torch.randn(4 * ROWS, 2 * COLUMNS, generator=draw).to(device, torch.bfloat16) for _ in range(2))
    one, wide = torch.full((), 8.0, device=device), torch.randn(4 * ROWS, C, generator=draw).to(device, torch.bfloat16)
    weight = torch.ones(C, device=device)
    pairs = [
        round_both_ways(x, E5M2, x.abs().max().float())[:2],
        round_both_ways(x, E5M2, one, sums=True)[:2],
        round_both_ways(x.float(), E4M3, one)[:2],
        round_both_ways(x, E4M3, one, form="gelu")[:2],
        round_both_ways(x, E5M2, one, form="dgelu", before=before, sums=True)[:2],
        layer_norm(wide, weight, weight, 1e-5, E4M3, one)[:2],
    ]
    same = [torch.equal(rows.numbers.view(torch.uint8), columns.numbers.view(torch.uint8).T) for rows, columns in pairs]
    same.append(torch.equal(pairs[0][0].numbers.view(torch.uint8), quantized(x, E5M2)[0].view(torch.uint8)))
    return None if all(same) else f"Triton {triton.__version__} compiles its rounding to FP8 wrongly on this GPU"


def pointers(rows: Rounded, columns: Rounded) -> tuple[Tensor, Tensor, Tensor]:
    return rows.numbers.view(torch.uint8), columns.numbers.view(torch.uint8), rows.scale


def exponent(dtype: torch.dtype) -> int:
    return int(TOP[dtype]).bit_length() - 1
