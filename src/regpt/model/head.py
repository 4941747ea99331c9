"""The head: hidden states to the summed loss; logits of a large vocabulary in chunks of rows, with a backward by hand.

Whole, N rows of V logits are written, widened, kept and differentiated: 17 GB for 16,384 × 128,256 in bfloat16. In
chunks, each chunk's logits become its loss and are overwritten by their gradient, which the two products of the
backward read at once. So the forward computes the gradients of a loss of 1, and the backward multiplies them by the
gradient of the loss: exact, because the loss is a scalar sum.

With Z = Σ exp(u), u = c·tanh(x/c) the capped logit (u = x without a cap) and z the coefficient of the z-loss, a row
with the target t contributes log Z - u_t + z·log²Z, and ∂/∂x_j = (p_j·(1 + 2z·log Z) - [j = t]) · (1 - (u_j/c)²).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a target that carries no loss; the default of torch.nn.functional.cross_entropy

# Logits are whole up to these many: of vocabularies up to 65,536, the largest that were measured whole (65,536 rows of
# GPT-2's 50,304, which torch.compile fuses); of larger ones, about one chunk.
SMALL_VOCAB, WHOLE_OF_SMALL, WHOLE = 2**16, 2**32, 2**26
CHUNK_BYTES = 7 * 2**26  # of a chunk's logits, in the format of the products: 1,792 rows of 128,256 in bfloat16
CHUNK_MULTIPLE = 128  # rows: tiles of matrix products are full
PIECE = 2**23  # logits whose softmax is computed at once: 32 MiB in float32
WEIGHT_ROWS = 8192  # rows of the weight's gradient at once, where its product cannot be added in float32

# (logits, targets, n_vocab, softcap, z_loss, gradient) → losses and log Z: see `softmax_in_place`
SoftmaxInPlace = Callable[[Tensor, Tensor, int, float, float, bool], tuple[Tensor, Tensor]]
Sums = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]  # see `chunked_sums`
LIBRARY = torch.library.Library("regpt", "FRAGMENT")  # operations that the compiler does not look into


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int, softcap: float = 0.0, sums: Sums | None = None
) -> Tensor:
    """Sum over the valid targets of -log softmax(hidden · weightᵀ)[target].

    Args:
        hidden: (N, C).
        weight: (V, C), V ≥ n_vocab; rows from n_vocab on are padding and take no part in the softmax.
        targets: (N,) int64 below n_vocab, `IGNORE_INDEX` for no target.
        softcap: c > 0 caps the logits at c·tanh(logits/c) (Gemma Team 2024, section 2); 0 leaves them.
        sums: computes the chunks; None for plain PyTorch.

    Returns:
        Scalar, float32 (float64 for float64 inputs). Above `WHOLE` logits it is computed in chunks.
    """
    if rows := chunk_rows(len(hidden), len(weight), product_dtype(hidden)):
        return in_chunks(hidden, weight, targets, n_vocab, softcap, 0.0, rows, sums)[0]
    return summed_losses(padded_logits(hidden, weight, n_vocab, softcap), targets)


def cross_entropy_with_z_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    z_loss: float,
    softcap: float = 0.0,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` plus `z_loss` times S; and S itself, detached: the sum over the valid targets of
    (log Σ exp(logits))², from the same logits."""
    if rows := chunk_rows(len(hidden), len(weight), product_dtype(hidden)):
        return in_chunks(hidden, weight, targets, n_vocab, softcap, z_loss, rows, sums)
    logits = padded_logits(hidden, weight, n_vocab, softcap)  # (N, V)
    squares = logits.logsumexp(dim=1).square().masked_fill(targets == IGNORE_INDEX, 0).sum()
    return summed_losses(logits, targets) + z_loss * squares, squares.detach()


def summed_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def losses_of_targets(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """The terms of `linear_cross_entropy` (without a softcap), (N,); 0 where there is no target.

    Logits of one chunk at a time, which the backward computes again: any function of the terms is differentiable.
    """

    def part(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = padded_logits(hidden, weight, n_vocab)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    rows = chunk_rows(len(hidden), len(weight), product_dtype(hidden))
    if not rows:
        return part(hidden, weight, targets)
    parts = zip(hidden.split(rows), targets.split(rows))
    return torch.cat([checkpoint(part, h, weight, t, use_reentrant=False) for h, t in parts])


def padded_logits(hidden: Tensor, weight: Tensor, n_vocab: int, softcap: float = 0.0) -> Tensor:
    """hidden · weightᵀ (N, V) in float32 (float64 for float64 inputs), capped; -inf in the columns of padding."""
    logits = F.linear(hidden, weight)
    logits = logits.to(wide(logits.dtype))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if weight.size(0) > n_vocab:
        padding = torch.arange(weight.size(0), device=logits.device) >= n_vocab  # (V,)
        logits = logits.masked_fill(padding, float("-inf"))
    return logits


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format of softmax, losses and sums over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The format in which F.linear multiplies here: autocast's, which leaves float64 alone."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and under_autocast(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def under_autocast(kind: str) -> bool:
    """Whether autocast is on; the meta device has none. (`is_autocast_available` breaks the graph of torch 2.11.)"""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def chunk_rows(N: int, V: int, dtype: torch.dtype) -> int:
    """Rows of a chunk of N × V logits in `dtype`; 0 where they are computed whole."""
    whole = WHOLE_OF_SMALL if V <= SMALL_VOCAB else WHOLE
    return 0 if whole >= N * V else rows_at_once(V, dtype)


def rows_at_once(V: int, dtype: torch.dtype) -> int:
    """Rows whose logits take `CHUNK_BYTES`, in whole tiles where that is more than one."""
    rows = CHUNK_BYTES // (V * dtype.itemsize)
    return max(1, rows // CHUNK_MULTIPLE * CHUNK_MULTIPLE or rows)


# ---- in chunks -------------------------------------------------------------------------------------------------------


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    softcap: float,
    z_loss: float,
    rows: int,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_with_z_loss`, `rows` rows at once, by `sums` (`with_softmax`); one backward for each loss."""
    sums = sums or PLAIN_SUMS
    of_hidden, of_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    given = hidden, weight, targets, n_vocab, softcap, z_loss, product_dtype(hidden), rows, of_hidden, of_weight
    if not (of_hidden or of_weight):
        loss, squares, *_ = sums(*given)
        return loss, squares
    loss, squares = InChunks.apply(sums, *given)  # type: ignore[misc]
    return loss, squares.detach()


class InChunks(torch.autograd.Function):
    """Ties `chunked_sums` to autograd. The backward overwrites its gradients: one backward for each loss."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, hidden: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        loss, squares, *gradients = sums(hidden, weight, *given)
        ctx.save_for_backward(*gradients)
        ctx.formats, ctx.wanted, ctx.used = (hidden.dtype, weight.dtype), given[-2:], False
        return loss, squares

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.compiler.is_compiling():
            if ctx.used:
                raise RuntimeError("a loss in chunks allows one backward: its gradients were overwritten")
            ctx.used = True
        found = zip(ctx.saved_tensors, ctx.formats, ctx.wanted)
        return None, *(scaled(grad, scale, dtype) if wanted else None for grad, dtype, wanted in found), *[None] * 8


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · scale in `dtype`, multiplied in the wider format, without a tensor in between; `grad` is lost where it has
    that format."""
    if dtype == grad.dtype and not torch.compiler.is_compiling():  # whose memory is the compiler's own affair
        return grad.mul_(scale)
    if dtype.itemsize >= grad.dtype.itemsize:
        return grad.to(dtype) * scale
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


@torch.no_grad()
def chunked_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    softcap: float,
    z_loss: float,
    dtype: torch.dtype,
    rows: int,
    of_hidden: bool,
    of_weight: bool,
    softmax: SoftmaxInPlace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss with its z-loss, Σ log²Z, and the gradients of hidden (N, C) in `dtype` and of weight (V, C) in float32
    (float64 for float64); without rows where they are not wanted. Products are in `dtype`, 16 bits of them unscaled:
    the gradient of a logit is at most 1, and one below 6e-8 is lost in float16."""
    N, C = hidden.shape
    w = weight.to(dtype)
    losses, log_z = hidden.new_empty(2, N, dtype=wide(dtype))
    grad_hidden = hidden.new_empty(N if of_hidden else 0, C, dtype=dtype)
    grad_weight = hidden.new_zeros(len(w) if of_weight else 0, C, dtype=wide(dtype))
    buffer = w.new_empty(min(rows, N), len(w))
    for part in (slice(first, first + rows) for first in range(0, N, rows)):
        h = hidden[part].to(dtype)
        logits = torch.mm(h, w.t(), out=buffer[: len(h)])  # (n, V)
        losses[part], log_z[part] = softmax(logits, targets[part], n_vocab, softcap, z_loss, of_hidden or of_weight)
        if of_hidden:
            torch.mm(logits, w, out=grad_hidden[part])
        if of_weight:
            add_product(grad_weight, logits, h)
    squares = log_z.square().sum()
    loss = losses.sum() + z_loss * squares if z_loss else losses.sum()
    return loss, squares, grad_hidden, grad_weight


def add_product(grad_weight: Tensor, dlogits: Tensor, h: Tensor) -> None:
    """Add dlogitsᵀ·h to `grad_weight` (V, C), in its format."""
    if grad_weight.dtype == h.dtype:
        grad_weight.addmm_(dlogits.t(), h)
    elif h.device.type == "cuda" and torch.version.cuda:
        torch.addmm(grad_weight, dlogits.t(), h, out_dtype=torch.float32, out=grad_weight)
    else:  # the product of a chunk is rounded to 16 bits
        for grad, columns in zip(grad_weight.split(WEIGHT_ROWS), dlogits.split(WEIGHT_ROWS, dim=1)):
            grad.add_(columns.t() @ h)


def softmax_in_place(
    logits: Tensor, targets: Tensor, n_vocab: int, softcap: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses without their z-loss, and log Z, of `logits` (n, V), both (n,) in float32 (float64 for float64) and 0
    without a target. With `gradient` the logits are overwritten by the gradient of the sum, z-loss included; else their
    content is lost."""
    rows = max(1, PIECE // logits.size(1))
    pieces = zip(logits.split(rows), targets.split(rows))
    losses, log_z = zip(*(softmax_of_piece(x, of, n_vocab, softcap, z_loss, gradient) for x, of in pieces))
    return torch.cat(losses), torch.cat(log_z)


def softmax_of_piece(
    logits: Tensor, targets: Tensor, n_vocab: int, softcap: float, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    valid = targets != IGNORE_INDEX  # (n,)
    at = targets.masked_fill(~valid, 0)[:, None]  # (n, 1)
    dtype = wide(logits.dtype)
    tanh = logits.to(dtype).div(softcap).tanh_() if softcap else None
    u = logits if tanh is None else tanh * softcap
    u[:, n_vocab:] = float("-inf")
    u_at = u.gather(1, at).to(dtype)
    log_p = u.log_softmax(dim=1, dtype=dtype)  # (n, V)
    log_p_at = log_p.gather(1, at)
    log_z = u_at - log_p_at
    if gradient:
        weight = valid[:, None] * (1 + 2 * z_loss * log_z)
        # p·weight - 1, of which p - 1 keeps its digits where p is near 1; rounded to the logits' format once.
        d_at = torch.where(valid[:, None], torch.expm1(log_p_at) + 2 * z_loss * log_z * log_p_at.exp(), 0)
        p = log_p.exp_()
        if tanh is not None:
            slope = tanh.square_().neg_().add_(1)  # of the cap
            p, d_at = p.mul_(slope), d_at * slope.gather(1, at)
        torch.mul(p, weight, out=logits)
        logits.scatter_(1, at, d_at.to(logits.dtype))
    return (-log_p_at * valid[:, None])[:, 0], log_z[:, 0].masked_fill(~valid, 0)


def sums_without_values(hidden: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and formats of `chunked_sums`, for the compiler."""
    *_, dtype, _, of_hidden, of_weight = given
    (N, C), V = hidden.shape, len(weight)
    loss, squares = (hidden.new_empty((), dtype=wide(dtype)) for _ in range(2))
    grad_hidden = hidden.new_empty(N if of_hidden else 0, C, dtype=dtype)
    return loss, squares, grad_hidden, hidden.new_empty(V if of_weight else 0, C, dtype=wide(dtype))


def with_softmax(name: str, softmax: SoftmaxInPlace) -> Sums:
    """`chunked_sums` with `softmax`; torch.compile sees one operation, regpt::`name`, instead of a loop to unroll."""
    LIBRARY.define(
        f"{name}(Tensor hidden, Tensor weight, Tensor targets, int n_vocab, float softcap, float z_loss, "
        "ScalarType dtype, int rows, bool of_hidden, bool of_weight) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def sums(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return chunked_sums(*given, softmax=softmax)

    LIBRARY.impl(name, sums, "CompositeExplicitAutograd")
    torch.library.register_fake(f"regpt::{name}", sums_without_values, lib=LIBRARY)
    operation = getattr(torch.ops.regpt, name)
    return lambda *given: operation(*given) if torch.compiler.is_compiling() else sums(*given)


PLAIN_SUMS = with_softmax("chunked_sums", softmax_in_place)
