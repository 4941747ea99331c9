"""The softmax of a chunk of the head as one Triton kernel: logits are read once and overwritten by their gradient.

With log Z, the z-loss and a cap of the logits, behind the signatures of `model.head`.
"""
# pyright: reportIndexIssue=false

from dataclasses import replace
from functools import partial

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from regpt.model import head
from regpt.model.ops import Ops

LOGIT_BLOCK, LOGIT_WARPS = 8192, 32  # logits a program holds in registers at once
LOGIT_LANE = 8  # neighbours of one thread: 16 bytes of bfloat16


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)  # where exp overflows 1, where it vanishes -1


@triton.jit
def softmax_in_place_kernel(
    logits_ptr, target_ptr, loss_ptr, log_z_ptr, n_vocab, V, softcap, z_loss,
    IGNORE: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        tl.store(log_z_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), tl.float32).to(logits_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK):
                tl.store(logits_ptr + first + column, zero, mask=first + column < V)
        return
    at_target = tl.load(logits_ptr + target).to(tl.float32)  # now: the barriers below keep it before the stores
    if SOFTCAP:
        at_target = softcap * tanh(at_target / softcap)
    # Each thread keeps a maximum and a sum of its own (Milakov & Gimelshein 2018), so nothing waits in the loop.
    lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    largest = tl.full((BLOCK // LANE,), -1e30, tl.float32)
    total = tl.zeros((BLOCK // LANE,), tl.float32)
    for first in range(0, n_vocab, BLOCK):  # the read from memory: the second one, below, mostly finds the L2 cache
        inside = first + lane < n_vocab
        u = tl.load(logits_ptr + first + lane, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        u = u.to(tl.float32)
        if SOFTCAP:
            u = tl.where(inside, softcap * tanh(u / softcap), -float("inf"))
        new = tl.maximum(largest, tl.max(u, 1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(u - new[:, None]), 1)
        largest = new
    highest = tl.max(largest, 0)
    rest = tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    log_z = highest + rest
    tl.store(loss_ptr + row, rest + (highest - at_target))  # in this order nothing large cancels
    tl.store(log_z_ptr + row, log_z)
    if GRADIENT:
        weight = 1.0 + 2.0 * z_loss * log_z
        for first in range(0, V, BLOCK):
            at = first + column
            u = tl.load(logits_ptr + at, mask=at < V, other=-float("inf"), eviction_policy="evict_first")
            u = u.to(tl.float32)
            slope = tl.full((BLOCK,), 1.0, tl.float32)
            if SOFTCAP:
                t = tanh(u / softcap)
                u = softcap * t
                slope = 1.0 - t * t
            softmax = tl.where(at < n_vocab, tl.exp(u - log_z), 0.0) * weight
            gradient = tl.where(at == target, softmax - 1.0, softmax) * slope
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)


def softmax_in_place(
    logits: Tensor, targets: Tensor, n_vocab: int, softcap: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`model.head.softmax_in_place`, in float32: float64 is left to that."""
    if logits.dtype == torch.float64:
        return head.softmax_in_place(logits, targets, n_vocab, softcap, z_loss, gradient)
    losses, log_z = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    softmax_in_place_kernel[(len(logits),)](
        logits, targets, losses, log_z, n_vocab, logits.size(1), float(softcap), float(z_loss),
        IGNORE=head.IGNORE_INDEX, SOFTCAP=softcap != 0, GRADIENT=gradient, BLOCK=LOGIT_BLOCK, LANE=LOGIT_LANE,
        num_warps=LOGIT_WARPS,
    )  # fmt: skip
    return losses, log_z


SUMS = head.with_softmax("chunked_sums_triton", softmax_in_place)


def in_one_kernel(ops: Ops) -> Ops:
    """`ops` whose heads in chunks take the kernel."""
    return replace(
        ops,
        linear_cross_entropy=partial(head.linear_cross_entropy, sums=SUMS),
        cross_entropy_with_z_loss=partial(head.cross_entropy_with_z_loss, sums=SUMS),
    )
