"""The operations between matrix products, in Triton: each tensor read once and written once.

Rows are tokens (N = B·T of them), columns the C features or V logits. 16-bit tensors are computed in float32. Every
kernel runs on any device that Triton knows, and on a CPU in its interpreter (TRITON_INTERPRET=1), where the tests
compare it with PyTorch.
"""
# pyright: reportIndexIssue=false

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from regpt.kernels.triton_head import softmax_in_place

NORM_ROWS, NORM_WARPS = 4, 4  # rows a program normalises at once
NORM_NUMBERS, RMS_BACKWARD_LANE, SWIGLU_BLOCK = 4096, 512, 1024  # numbers of a program; of a warp; of a program
BACKWARD_ROWS, BACKWARD_WARPS = 1, 1
BACKWARD_PROGRAMS = 8  # for each multiprocessor: each keeps partial column sums, so few are better than many
SUM_COLUMNS, SUM_ROWS, SUM_PARTS = 128, 32, 32


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, N, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = column < C
    at = row[:, None].to(tl.int64) * C + column[None, :]
    inside = (row[:, None] < N) & real[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centred = x
    if CENTRED:
        mean = tl.sum(x, 1) / C
        centred = tl.where(real[None, :], x - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean, mask=row < N)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    h = centred * rstd[:, None] * weight[None, :]
    if CENTRED:
        h += tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def norm_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr, longest_ptr, N,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr,
    LONGEST: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    real = column < C
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    dsum = tl.zeros((ROWS, BLOCK), tl.float32)
    longest = tl.zeros((ROWS,), tl.float32)
    for first in range(program * ROWS, N, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * C + column[None, :]
        inside = (row[:, None] < N) & real[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # n = (x - μ)/σ, dn = dh·w: dx = (dn - n·mean(dn·n) - mean(dn))/σ (`reference.gpt2.layer_norm_backward`);
        # without μ, its last term goes, too (`reference.llama.rms_norm_backward`).
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
            x = tl.where(inside, x - mean[:, None], 0.0)
        normed = x * rstd[:, None]
        scaled = dh * weight[None, :]
        along = tl.sum(scaled * normed, 1) / C
        across = scaled - normed * along[:, None]
        if CENTRED:
            level = tl.sum(scaled, 1) / C
            across -= level[:, None]
        dx = across * rstd[:, None]
        if RESIDUAL:
            dx += tl.load(dresidual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dh * normed
        if CENTRED:
            dbias += dh
            dsum += tl.where(inside, dx, 0.0)
        if LONGEST:
            longest = tl.maximum(longest, tl.sum(tl.where(inside, dx * dx, 0.0), 1))
    to = partial_ptr + program * (3 if CENTRED else 1) * C + column
    tl.store(to, tl.sum(dweight, 0), mask=real)
    if CENTRED:
        tl.store(to + C, tl.sum(dbias, 0), mask=real)
        tl.store(to + 2 * C, tl.sum(dsum, 0), mask=real)
    if LONGEST:
        tl.atomic_max(longest_ptr, tl.sqrt(tl.max(longest, 0)), sem="relaxed")


@triton.jit
def add_partial_sums_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr, N, C, stride, ADD0: tl.constexpr, ADD1: tl.constexpr, ADD2: tl.constexpr,
    OUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, N, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < N) & (column[None, :] < C)
        total += tl.load(partial_ptr + row[:, None] * stride + which * C + column[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    if which == 0:
        before = tl.load(out0_ptr + column, mask=column < C, other=0.0) if ADD0 else 0.0
        tl.store(out0_ptr + column, before + sums, mask=column < C)
    if OUTS > 1 and which == 1:
        before = tl.load(out1_ptr + column, mask=column < C, other=0.0) if ADD1 else 0.0
        tl.store(out1_ptr + column, before + sums, mask=column < C)
    if OUTS > 2 and which == 2:
        before = tl.load(out2_ptr + column, mask=column < C, other=0.0) if ADD2 else 0.0
        tl.store(out2_ptr + column, before + sums, mask=column < C)


@triton.jit
def column_sums_kernel(x_ptr, partial_ptr, N, C, stride, rows_each, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * rows_each
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, tl.minimum(start + rows_each, N), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < tl.minimum(start + rows_each, N)) & (column[None, :] < C)
        at = row[:, None].to(tl.int64) * stride + column[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1) * C + column, tl.sum(total, 0), mask=column < C)


@triton.jit
def embed_kernel(
    idx_ptr, position_ptr, wte_ptr, wpe_ptr, x_ptr, N, T,
    C: tl.constexpr, LEARNED: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx_ptr + row)
    real = column < C
    x = tl.load(wte_ptr + token * C + column, mask=real)
    if LEARNED:
        position = tl.load(position_ptr + row) if POSITIONS else (row % T).to(tl.int64)
        x += tl.load(wpe_ptr + position * C + column, mask=real)
    tl.store(x_ptr + row.to(tl.int64) * C + column, x.to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def embed_backward_kernel(
    idx_ptr, position_ptr, dx_ptr, dwte_ptr, dwpe_ptr, T,
    C: tl.constexpr, LEARNED: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < C
    dx = tl.load(dx_ptr + row.to(tl.int64) * C + column, mask=real, other=0.0).to(tl.float32)
    token = tl.load(idx_ptr + row)
    tl.atomic_add(dwte_ptr + token * C + column, dx, mask=real, sem="relaxed")
    if LEARNED:
        position = tl.load(position_ptr + row) if POSITIONS else (row % T).to(tl.int64)
        tl.atomic_add(dwpe_ptr + position * C + column, dx, mask=real, sem="relaxed")


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, columns, T, heads,
    HALF: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    head = tl.arange(0, HEADS)
    cos = tl.load(cos_ptr + (row % T) * HALF + lane, mask=lane < HALF)[None, :]
    sin = tl.load(sin_ptr + (row % T) * HALF + lane, mask=lane < HALF)[None, :]
    if BACK:
        sin = -sin
    left_ptr = x_ptr + row.to(tl.int64) * columns + head[:, None] * (2 * HALF) + lane[None, :]
    inside = (head[:, None] < heads) & (lane[None, :] < HALF)
    left = tl.load(left_ptr, mask=inside).to(tl.float32)
    right = tl.load(left_ptr + HALF, mask=inside).to(tl.float32)
    tl.store(left_ptr, (left * cos - right * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(left_ptr + HALF, (right * cos + left * sin).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    gate = tl.load(gate_up_ptr + row * 2 * inner + column, mask=real).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * inner + inner + column, mask=real).to(tl.float32)
    tl.store(out_ptr + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def swiglu_backward_kernel(dout_ptr, gate_up_ptr, dgate_up_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < inner
    to = row * 2 * inner + column
    gate = tl.load(gate_up_ptr + to, mask=real).to(tl.float32)
    up = tl.load(gate_up_ptr + to + inner, mask=real).to(tl.float32)
    dout = tl.load(dout_ptr + row * inner + column, mask=real).to(tl.float32)
    # silu(a) = a·σ(a), silu'(a) = σ(a)·(1 + a·(1 - σ(a)))
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_up_ptr + to, dgate.to(dgate_up_ptr.dtype.element_ty), mask=real)
    tl.store(dgate_up_ptr + to + inner, (dout * gate * sigmoid).to(dgate_up_ptr.dtype.element_ty), mask=real)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LayerNorm of x (N, C): the result in the dtype of x; and mean and 1/standard deviation, (N,) float32."""
    N, C = x.shape
    h = torch.empty_like(x)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    grid = (triton.cdiv(N, NORM_ROWS),)
    block = triton.next_power_of_2(C)
    norm_forward_kernel[grid](
        x, weight, bias, h, mean, rstd, N, eps, C=C, BLOCK=block, ROWS=NORM_ROWS, CENTRED=True, num_warps=NORM_WARPS
    )
    return h, (mean, rstd)


def layer_norm_backward(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    longest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x (N, C), with the residual's own gradient added; and partial column sums, to be finished by
    `add_partial_sums`: (P, 3, C) float32 of the gradients of weight and bias, and of the gradient of x itself, which is
    the gradient of the bias of the product that x came from. `longest`, a float32 scalar, is raised to the length of
    the longest row of the gradient of x.
    """
    N, C = x.shape
    dx = torch.empty_like(x)
    programs = min(multiprocessors(x.device) * BACKWARD_PROGRAMS, triton.cdiv(N, BACKWARD_ROWS))
    partial = torch.empty(programs, 3, C, dtype=torch.float32, device=x.device)
    norm_backward_kernel[(programs,)](
        dh, x, weight, mean, rstd, dresidual, dx, partial, longest, N,
        C=C, BLOCK=triton.next_power_of_2(C), ROWS=BACKWARD_ROWS, CENTRED=True, RESIDUAL=dresidual is not None,
        LONGEST=longest is not None, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dx, partial


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (N, C): the result in the dtype of x; and 1/root mean square, (N,) float32."""
    N, C = x.shape
    h, rstd = torch.empty_like(x), torch.empty(N, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    rows = max(1, NORM_NUMBERS // block)
    norm_forward_kernel[(triton.cdiv(N, rows),)](
        x, weight, None, h, None, rstd, N, eps, C=C, BLOCK=block, ROWS=rows, CENTRED=False, num_warps=NORM_WARPS
    )
    return h, rstd


def rms_norm_backward(
    dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of x (N, C), with the residual's own gradient added; and partial sums (P, 1, C) of the weight's."""
    N, C = x.shape
    dx = torch.empty_like(x)
    programs = min(multiprocessors(x.device) * BACKWARD_PROGRAMS, N)
    partial = torch.empty(programs, 1, C, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    norm_backward_kernel[(programs,)](
        dh, x, weight, None, rstd, dresidual, dx, partial, None, N,
        C=C, BLOCK=block, ROWS=1, CENTRED=False, RESIDUAL=dresidual is not None, LONGEST=False,
        num_warps=min(16, max(1, block // RMS_BACKWARD_LANE)),
    )  # fmt: skip
    return dx, partial


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, heads: int, *, back: bool = False) -> None:
    """Turn the first `heads` heads of x (N, columns) in place, pairs (i, i + D/2), by each row's angles, or `back`.

    cos, sin: float32, (T, D/2) of the positions of rows of T, N a multiple of it.
    """
    half = head_size // 2
    rotate_kernel[(len(x),)](
        x, cos, sin, x.size(1), cos.numel() // half, heads,
        HALF=half, BACK=back, HEADS=triton.next_power_of_2(heads), LANES=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (N, I), of gate_up (N, 2·I)."""
    N, both = gate_up.shape
    out = gate_up.new_empty(N, both // 2)
    grid = N, triton.cdiv(both // 2, SWIGLU_BLOCK)
    swiglu_kernel[grid](gate_up, out, both // 2, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up (N, 2·I), given that of `swiglu` (N, I)."""
    N, inner = dout.shape
    dgate_up = torch.empty_like(gate_up)
    grid = N, triton.cdiv(inner, SWIGLU_BLOCK)
    swiglu_backward_kernel[grid](dout, gate_up, dgate_up, inner, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return dgate_up


def add_partial_sums(partial: Tensor, outs: list[tuple[Tensor, bool]]) -> Tensor:
    """Add the sums over the first dimension of `partial` (P, K, C) to the first K or fewer of `outs`, (C,) float32; an
    out with False is overwritten instead. Returns fewer partial sums, (P, K, C) with a smaller P.
    """
    P, K, C = partial.shape
    if P > 2 * SUM_PARTS:
        fewer = partial.new_empty(SUM_PARTS, K, C)
        column_sums_kernel[(triton.cdiv(K * C, SUM_COLUMNS), SUM_PARTS)](
            partial, fewer, P, K * C, K * C, triton.cdiv(P, SUM_PARTS), ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4
        )
        partial, P = fewer, SUM_PARTS
    (out0, add0), (out1, add1), (out2, add2) = (*outs, *[outs[0]] * (3 - len(outs)))
    add_partial_sums_kernel[(triton.cdiv(C, 32), len(outs))](
        partial, out0, out1, out2, P, C, K * C,
        ADD0=add0, ADD1=add1, ADD2=add2, OUTS=len(outs), ROWS=SUM_PARTS, COLUMNS=32, num_warps=1,
    )  # fmt: skip
    return partial


def add_column_sums(x: Tensor, out: Tensor, add: bool) -> None:
    """Add the sums of the columns of x (N, C) to `out` (C,) float32, or write them there. Rows of x may be strided."""
    N, C = x.shape
    blocks = triton.cdiv(C, SUM_COLUMNS)
    programs = triton.cdiv(multiprocessors(x.device) * 8, blocks)
    partial = torch.empty(programs, 1, C, dtype=torch.float32, device=x.device)
    column_sums_kernel[(blocks, programs)](
        x, partial, N, C, x.stride(0), triton.cdiv(N, programs), ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4
    )
    add_partial_sums(partial, [(out, add)])


def cross_entropy(logits: Tensor, targets: Tensor, n_vocab: int, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] of each row, (N,) float32, 0 where the target is `IGNORE_INDEX`.

    Args:
        logits: (N, V), V ≥ n_vocab: the columns from n_vocab on are padding. With `gradient` they are overwritten by
            the gradient of the sum of the losses.
        targets: (N,) int64.
    """
    return softmax_in_place(logits, targets, n_vocab, 0.0, 0.0, gradient)[0]


def embed(idx: Tensor, positions: Tensor | None, wte: Tensor, wpe: Tensor | None, dtype: torch.dtype) -> Tensor:
    """wte[idx] + wpe[positions], (B·T, C) of `dtype`; positions (B, T) int64, None for 0 … T - 1 in each row. Without
    `wpe`, wte[idx]."""
    N, C = idx.numel(), wte.size(1)
    x = torch.empty(N, C, dtype=dtype, device=idx.device)
    embed_kernel[(N,)](
        idx, positions, wte, wpe, x, N, idx.size(1),
        C=C, LEARNED=wpe is not None, POSITIONS=positions is not None, BLOCK=triton.next_power_of_2(C), num_warps=2,
    )  # fmt: skip
    return x


def embed_backward(dx: Tensor, idx: Tensor, positions: Tensor | None, dwte: Tensor, dwpe: Tensor | None) -> None:
    """Add the gradients of the embeddings, given dx (B·T, C), to dwte and dwpe, float32. The order of the additions is
    not fixed, so the last bits are not either.
    """
    C = dwte.size(1)
    embed_backward_kernel[(idx.numel(),)](
        idx, positions, dx, dwte, dwpe, idx.size(1),
        C=C, LEARNED=dwpe is not None, POSITIONS=positions is not None, BLOCK=triton.next_power_of_2(C), num_warps=2,
    )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
