"""Attention whose mask stays data: documents and windows take memory O(B·T), not B·T² booleans, and cost what is seen.

On NVIDIA GPUs, in bfloat16 and float16: cuDNN where `nvidia-cudnn-frontend` is installed (Hopper and later), torch's
FlashAttention-2 (Dao 2023) elsewhere and for deterministic algorithms. Both skip the blocks of which nothing is seen.
The plain operation, in chunks, remains for trees, for caches, for float32 and for sizes of heads that they do not have.
"""

import atexit
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpt.kernels.attention import AttentionShape, CudnnAttention, documents_in, split_heads
from regpt.model.chunked import plain_mask
from regpt.model.masks import AttentionMask
from regpt.model.ops import Ops, attention

HALF = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY, CUDNN_CAPABILITY = (8, 0), (9, 0)  # cuDNN has documents from Hopper on
FLASH_HEAD, CUDNN_HEAD, HEAD_MULTIPLE = 256, 128, 8  # the largest heads of their backwards, and what divides all


class Band(NamedTuple):
    """A causal mask for the kernels; a tuple, which activation checkpointing and the compiler take apart.

    Attributes:
        documents: (documents + 1,) int32, cumulative lengths; every row begins one.
        window: as in `AttentionMask`, below T.
    """

    documents: Tensor | None
    window: int | None


# (q, k, v, documents, window) → out: q and out (B, T, H, D), k and v (B, T, G, D), contiguous
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int | None], Tensor]


def with_masks_as_data(ops: Ops, device: torch.device) -> Ops:
    """`ops` with the attention of this file where `device` has one of its kernels and `ops` the plain attention."""
    attend = kernel_of(device)
    if attend is None or ops.attention is not attention:
        return ops
    return replace(ops, attention=partial(attend_in_band, attend=attend), translate_mask=band)


def kernel_of(device: torch.device) -> Attend | None:
    if device.type != "cuda" or not torch.version.cuda:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= CUDNN_CAPABILITY and find_spec("cudnn"):
        return cudnn
    return flash if capability >= FLASH_CAPABILITY else None


def mask_kernel(ops: Ops) -> str | None:
    """Name of the kernel that computes masks in `ops`; None where the plain operation does."""
    return ops.attention.keywords["attend"].__name__ if isinstance(ops.attention, partial) else None


def band(mask: AttentionMask, B: int, T: int, S: int, device: torch.device) -> Any:
    """`mask` for `attend_in_band`: a `Band` for documents and windows, else what `plain_mask` gives."""
    window = mask.window if mask.window is not None and mask.window < T else None
    if T != S or not mask.causal or mask.tree is not None or (window is None and mask.documents is None):
        return plain_mask(mask, B, T, S, device)
    if mask.documents is None:
        return Band(None, window)
    rows = torch.arange(T, B * T, T, device=device, dtype=mask.documents.dtype)  # kernels know no rows: cut there
    return Band(torch.cat([mask.documents, rows]).sort().values.to(torch.int32), window)


def attend_in_band(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, attend: Attend) -> Tensor:
    """`ops.attention`, whose mask is what `band` gave."""
    if not isinstance(mask, Band):
        return attention(q, k, v, mask)
    B, _, T, D = q.shape
    if v.dtype not in HALF or D % HEAD_MULTIPLE or D > FLASH_HEAD:
        seen = plain_mask(AttentionMask(window=mask.window, documents=mask.documents), B, T, T, q.device)
        return attention(q, k, v, seen)
    # Norms of q and k give float32 under autocast, which rounds for torch's own attention but not for these kernels.
    q, k, v = (y.to(v.dtype).transpose(1, 2).contiguous() for y in (q, k, v))  # (B, T, H or G, D)
    return attend(q, k, v, mask.documents, mask.window).transpose(1, 2)  # (B, H, T, D)


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    """By the kernel under `scaled_dot_product_attention`, which itself reaches neither documents nor windows."""
    T = q.size(1)
    ends = (None, None) if window is None else (window - 1, 0)
    given = (q, k, v) if documents is None else tuple(y.flatten(0, 1) for y in (q, k, v))  # (B·T, H or G, D)
    out = torch.ops.aten._flash_attention_forward(
        *given, documents, documents, T, T, 0.0, True, False, window_size_left=ends[0], window_size_right=ends[1]
    )[0]
    return out.view_as(q)


def cudnn(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    too_large = q.numel() >= 2**31  # offsets are int32
    if torch.are_deterministic_algorithms_enabled() or q.size(-1) > CUDNN_HEAD or too_large:
        return flash(q, k, v, documents, window)
    return torch.ops.regpt.attention(q, k, v, documents, window)[0].view_as(q)


class TorchAttention:
    """What `CudnnAttention` does on the packed product, by torch's kernels: for machines without
    `nvidia-cudnn-frontend`."""

    name = "torch"

    def forward(self, qkv: Tensor, heads: tuple[int, int], mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """Output (B, T, C); the second result is empty: the backward recomputes the forward."""
        with torch.no_grad():
            return self.attend(qkv, heads, mask), qkv.new_empty(0)

    def attend(self, qkv: Tensor, heads: tuple[int, int], mask: AttentionMask) -> Tensor:
        B, T, _ = qkv.shape
        given = zip(split_heads(qkv, heads), (heads[0], heads[1], heads[1]))
        q, k, v = (y.unflatten(2, (n, -1)).transpose(1, 2) for y, n in given)  # (B, H or G, T, D)
        if kernel_of(qkv.device):
            out = attend_in_band(q, k, v, band(mask, B, T, T, qkv.device), attend=flash)
        else:
            out = attention(q, k, v, plain_mask(mask, B, T, T, qkv.device))
        return out.transpose(1, 2).flatten(2)

    def backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, heads: tuple[int, int], mask: AttentionMask
    ) -> Tensor:
        with torch.enable_grad():
            again = qkv.detach().requires_grad_()
            return torch.autograd.grad(self.attend(again, heads, mask), again, dout)[0]


# ---- cuDNN as an operation that torch.compile keeps whole ------------------------------------------------------------


@lru_cache
def cudnn_on(device: torch.device) -> CudnnAttention:
    return CudnnAttention(device)


atexit.register(cudnn_on.cache_clear)  # the frontend prints the graphs that are left when Python ends


def shape_of(q: Tensor, k: Tensor, documents: Tensor | None, window: int | None) -> AttentionShape:
    (B, T, H, D), G = q.shape, k.size(2)
    return AttentionShape(B, T, H, D, q.dtype, documents_in(documents), G, window, packed=False)


@torch.library.custom_op(
    "regpt::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? documents, int? window) -> (Tensor, Tensor)",
)
def forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> tuple[Tensor, Tensor]:
    return cudnn_on(q.device).attend(shape_of(q, k, documents, window), (q, k, v), documents)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    sizes = (B, H, T, 1) if documents is None else (B * T, H)
    return q.new_empty(B, T, H * D), q.new_empty(sizes, dtype=torch.float32)


@torch.library.custom_op(
    "regpt::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor? documents, int? window)"
    " -> (Tensor, Tensor, Tensor)",
)
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    documents: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = shape_of(q, k, documents, window)
    cudnn_on(q.device).differentiate(shape, (q, k, v), (dout, out, stats), gradients, documents)
    return gradients


@backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, stats, documents = ctx.saved_tensors
    gradients = torch.ops.regpt.attention_backward(dout.contiguous(), q, k, v, out, stats, documents, ctx.window)
    return *gradients, None, None


forward.register_autograd(differentiate, setup_context=keep)
