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

NORM_ROWS, NORM_WARPS = 4, 4  # rows a program normalises at once
BACKWARD_ROWS, BACKWARD_WARPS = 1, 1
BACKWARD_PROGRAMS = 8  # for each multiprocessor: each keeps partial column sums, so few are better than many
SUM_COLUMNS, SUM_ROWS, SUM_PARTS = 128, 32, 32
LOGIT_BLOCK, LOGIT_WARPS = 8192, 32  # logits a program holds in registers at once
LOGIT_LANE = 8  # neighbours of one thread: 16 bytes of bfloat16


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, N, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = column < C
    at = row[:, None].to(tl.int64) * C + column[None, :]
    inside = (row[:, None] < N) & real[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(real[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)
    h = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def layer_norm_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr, longest_ptr, N,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, LONGEST: tl.constexpr,
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
        mean = tl.load(mean_ptr + row, mask=row < N, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # n = (x - μ)/σ, dn = dh·w: dx = (dn - n·mean(dn·n) - mean(dn))/σ (`reference.gpt2.layer_norm_backward`).
        normed = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        scaled = dh * weight[None, :]
        along = tl.sum(scaled * normed, 1) / C
        level = tl.sum(scaled, 1) / C
        dx = (scaled - normed * along[:, None] - level[:, None]) * rstd[:, None]
        if RESIDUAL:
            dx += tl.load(dresidual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dh * normed
        dbias += dh
        dsum += tl.where(inside, dx, 0.0)
        if LONGEST:
            longest = tl.maximum(longest, tl.sum(tl.where(inside, dx * dx, 0.0), 1))
    to = partial_ptr + program * 3 * C + column
    tl.store(to, tl.sum(dweight, 0), mask=real)
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
def cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, n_vocab, V,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), tl.float32).to(logits_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK):
                tl.store(logits_ptr + first + column, zero, mask=first + column < V)
        return
    at_target = tl.load(logits_ptr + target).to(tl.float32)  # now: the barriers below keep it before the stores
    # Each thread keeps a maximum and a sum of its own (Milakov & Gimelshein 2018), so nothing waits in the loop.
    lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    largest = tl.full((BLOCK // LANE,), -1e30, tl.float32)
    total = tl.zeros((BLOCK // LANE,), tl.float32)
    for first in range(0, n_vocab, BLOCK):  # the read from memory: the second one, below, mostly finds the L2 cache
        inside = first + lane < n_vocab
        x = tl.load(logits_ptr + first + lane, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        largest = new
    highest = tl.max(largest, 0)
    rest = tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    tl.store(loss_ptr + row, rest + (highest - at_target))  # in this order nothing large cancels
    log_sum = highest + rest
    if GRADIENT:
        for first in range(0, V, BLOCK):
            at = first + column
            x = tl.load(logits_ptr + at, mask=at < V, other=-float("inf"), eviction_policy="evict_first")
            softmax = tl.where(at < n_vocab, tl.exp(x.to(tl.float32) - log_sum), 0.0)
            gradient = tl.where(at == target, softmax - 1.0, softmax)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def embed_kernel(
    idx_ptr, position_ptr, wte_ptr, wpe_ptr, x_ptr, N, T, C: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx_ptr + row)
    position = tl.load(position_ptr + row) if POSITIONS else (row % T).to(tl.int64)
    real = column < C
    x = tl.load(wte_ptr + token * C + column, mask=real) + tl.load(wpe_ptr + position * C + column, mask=real)
    tl.store(x_ptr + row.to(tl.int64) * C + column, x.to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def embed_backward_kernel(
    idx_ptr, position_ptr, dx_ptr, dwte_ptr, dwpe_ptr, T, C: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < C
    dx = tl.load(dx_ptr + row.to(tl.int64) * C + column, mask=real, other=0.0).to(tl.float32)
    token = tl.load(idx_ptr + row)
    position = tl.load(position_ptr + row) if POSITIONS else (row % T).to(tl.int64)
    tl.atomic_add(dwte_ptr + token * C + column, dx, mask=real, sem="relaxed")
    tl.atomic_add(dwpe_ptr + position * C + column, dx, mask=real, sem="relaxed")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LayerNorm of x (N, C): the result in the dtype of x; and mean and 1/standard deviation, (N,) float32."""
    N, C = x.shape
    h = torch.empty_like(x)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    grid = (triton.cdiv(N, NORM_ROWS),)
    block = triton.next_power_of_2(C)
    layer_norm_forward_kernel[grid](
        x, weight, bias, h, mean, rstd, N, eps, C=C, BLOCK=block, ROWS=NORM_ROWS, num_warps=NORM_WARPS
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
    layer_norm_backward_kernel[(programs,)](
        dh, x, weight, mean, rstd, dresidual, dx, partial, longest, N,
        C=C, BLOCK=triton.next_power_of_2(C), ROWS=BACKWARD_ROWS, RESIDUAL=dresidual is not None,
        LONGEST=longest is not None, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dx, partial


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


def cross_entropy(logits: Tensor, targets: Tensor, n_vocab: int, ignore_index: int, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] of each row, (N,) float32, 0 where the target is `ignore_index`.

    Args:
        logits: (N, V), V ≥ n_vocab: the columns from n_vocab on are padding. With `gradient` they are overwritten by
            the gradient of the sum of the losses.
        targets: (N,) int64.
    """
    N = logits.size(0)
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(N,)](
        logits, targets, losses, n_vocab, logits.size(1),
        IGNORE=ignore_index, GRADIENT=gradient, BLOCK=LOGIT_BLOCK, LANE=LOGIT_LANE, num_warps=LOGIT_WARPS,
    )  # fmt: skip
    return losses


def embed(idx: Tensor, positions: Tensor | None, wte: Tensor, wpe: Tensor, dtype: torch.dtype) -> Tensor:
    """wte[idx] + wpe[positions], (B·T, C) of `dtype`; positions (B, T) int64, None for 0 … T - 1 in each row."""
    N, C = idx.numel(), wte.size(1)
    x = torch.empty(N, C, dtype=dtype, device=idx.device)
    embed_kernel[(N,)](
        idx, positions, wte, wpe, x, N, idx.size(1),
        C=C, POSITIONS=positions is not None, BLOCK=triton.next_power_of_2(C), num_warps=2,
    )  # fmt: skip
    return x


def embed_backward(dx: Tensor, idx: Tensor, positions: Tensor | None, dwte: Tensor, dwpe: Tensor) -> None:
    """Add the gradients of the embeddings, given dx (B·T, C), to dwte and dwpe, float32. The order of the additions is
    not fixed, so the last bits are not either.
    """
    C = dwte.size(1)
    embed_backward_kernel[(idx.numel(),)](
        idx, positions, dx, dwte, dwpe, idx.size(1),
        C=C, POSITIONS=positions is not None, BLOCK=triton.next_power_of_2(C), num_warps=2,
    )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
