"""Attention to keys and values in pages (`engine.cache`): one new token a text by Triton, prompts by FlashAttention-2.

The arithmetic is that of `DecodeView.attend_pages` and of `ops.attention`, which are the references in the tests.
"""
# pyright: reportIndexIssue=false

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from regpt.kernels.masked import FLASH_CAPABILITY, FLASH_HEAD, HALF, HEAD_MULTIPLE

BLOCK, WARPS = 64, 4  # positions that a program reads at once
LOWEST = tl.constexpr(-1e30)  # a score below all others, of which differences are finite


def prefills(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `prefill_attention` computes this."""
    fits = dtype in HALF and head_size % HEAD_MULTIPLE == 0 and head_size <= FLASH_HEAD
    return fits and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def launches_early(device: torch.device) -> bool:
    """Whether kernels start while the one before them runs, up to where they need its results (programmatic dependent
    launch, from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def load_positions(
    k_ptr, v_ptr, page_ptr, at, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Keys and values (BLOCK, BLOCK_D) of one head at positions."""
    feature = tl.arange(0, BLOCK_D)
    page = tl.load(page_ptr + at // PAGE, mask=seen, other=0)
    place = (page * PAGE + at % PAGE)[:, None] * D + feature[None, :]
    inside = seen[:, None] & (feature < D)[None, :]
    return tl.load(k_ptr + place, mask=inside, other=0.0), tl.load(v_ptr + place, mask=inside, other=0.0)


@triton.jit
def attend_block(q, k, v, seen, top, total, y):
    """One more position for each of BLOCK partial results: the largest score so far (BLOCK,), the sum of weights
    relative to it, and the weighted sum of values (BLOCK, BLOCK_D) (Milakov & Gimelshein 2018)."""
    scores = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
    higher = tl.maximum(top, scores)
    weights, shrink = tl.exp(scores - higher), tl.exp(top - higher)
    return higher, total * shrink + weights, y * shrink[:, None] + v.to(tl.float32) * weights[:, None]


@triton.jit
def attend_pages(
    q, k_ptr, v_ptr, page_ptr, first, end, top, total, y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`attend_block` for positions first … end - 1."""
    for start in range(first // BLOCK * BLOCK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at >= first) & (at < end)
        k, v = load_positions(k_ptr, v_ptr, page_ptr, at, seen, D, BLOCK_D, PAGE)
        top, total, y = attend_block(q, k, v, seen, top, total, y)
    return top, total, y


@triton.jit
def attend_to_own(
    q, k, v, seen, k_own, v_own, k_ptr, v_ptr, page_ptr, position,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention (BLOCK_D,) of q to the token's own key and value and to all positions before it, of which the first
    BLOCK are already loaded (k, v)."""
    top, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    top, total, y = attend_block(q, k, v, seen, top, total, tl.zeros((BLOCK, BLOCK_D), tl.float32))
    top, total, y = attend_pages(q, k_ptr, v_ptr, page_ptr, BLOCK, position, top, total, y, D, BLOCK_D, PAGE, BLOCK)
    score = tl.sum(q * k_own.to(tl.float32), 0)
    highest = tl.maximum(tl.max(top, 0), score)
    shares, weight = tl.exp(top - highest), tl.exp(score - highest)
    total = tl.sum(total * shares, 0) + weight
    y = tl.sum(y * shares[:, None], 0) + v_own.to(tl.float32) * weight
    return y / total


@triton.jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, position_ptr, out_ptr, q_row, q_head, kv_head, table_row, position_row, scale,
    window, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(position_ptr + row * position_row).to(tl.int32)
    feature = tl.arange(0, BLOCK_D)
    real = feature < D
    q = tl.load(q_ptr + row * q_row + head * q_head + feature, mask=real, other=0.0).to(tl.float32) * scale
    of_head = (head // (H // G)).to(tl.int64) * kv_head
    first = 0
    if WINDOW:
        first = tl.maximum(last - window + 1, 0)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    pages = table_ptr + row * table_row
    top, total, y = attend_pages(
        q, k_ptr + of_head, v_ptr + of_head, pages, first, last + 1, top, total, y, D, BLOCK_D, PAGE, BLOCK
    )
    shares = tl.exp(top - tl.max(top, 0))
    total, y = tl.sum(total * shares, 0), tl.sum(y * shares[:, None], 0)
    tl.store(out_ptr + (row * H + head) * D + feature, (y / total).to(out_ptr.dtype.element_ty), mask=real)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, page_size: int, window: int | None
) -> Tensor:
    """Attention of the rows q (B, H, D) to the positions up to their own in the pages of `tables`: (B, H, D).

    `keys`, `values` (G, slots, D) contiguous; `tables` (B, pages) and `positions` (B,) int64. No host synchronisation.
    """
    B, H, D = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    out = q.new_empty(B, H, D)
    decode_attention_kernel[(B, H)](
        q, keys, values, tables, positions, out, q.stride(0), q.stride(1), keys.stride(0), tables.stride(0),
        positions.stride(0), D**-0.5, window or 0, H=H, G=keys.size(0), D=D, BLOCK_D=triton.next_power_of_2(D),
        PAGE=page_size, BLOCK=BLOCK, WINDOW=window is not None, num_warps=WARPS,
    )  # fmt: skip
    return out


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    """Causal attention of several texts' tokens, the last of each: q (1, H, N, D) to k and v (1, G, S, D), alike out.

    Args:
        lengths: (texts + 1,) int32 each, cumulative, of the queries and of the keys.
        longest: of one text, queries and keys.
    """
    rows: tuple[Any, ...] = tuple(y[0].transpose(0, 1) for y in (q, k, v))  # (N or S, H or G, D)
    ends = (None, None) if window is None else (window - 1, 0)
    y = torch.ops.aten._flash_attention_forward(
        *rows, *lengths, *longest, 0.0, True, False, window_size_left=ends[0], window_size_right=ends[1]
    )[0]
    return y.transpose(0, 1)[None]
