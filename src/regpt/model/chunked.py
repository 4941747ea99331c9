"""Attention under a mask that stays data, in chunks of queries: booleans of one chunk and its keys, never B·T².

Each query sees keys from its first one to its own, of a tree those that have not ended; a chunk reads the keys from the
first one that any of its queries sees. The backward computes a chunk's probabilities again, so that q, k and v are all
that is kept. Works on every device and in every format; `kernels.masked` has faster kernels for some.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.model.head import LIBRARY, product_dtype, wide
from regpt.model.masks import AttentionMask, sdpa_mask

BOOLEANS = 2**23  # masks of up to so many are one tensor
CHUNK = 512  # queries whose booleans exist at once
PIECE = 2**26  # probabilities that the backward by hand computes at once: 256 MiB in float32
LEAST = 16  # queries of the backward at once, however many keys and heads there are
KEY_MULTIPLE = 64  # of a chunk's first key: masks are read in whole vectors

aten = torch.ops.aten


class SeenKeys(NamedTuple):
    """A causal mask: query i, the (S - T + i)-th of S positions, sees key j where first[i] ≤ j ≤ S - T + i, and
    S - T + i < until[j]. A tuple, which activation checkpointing and the compiler take apart.

    Attributes:
        first: (B or 1, T) int64, nondecreasing.
        until: (B, S) int64 or None.
        lowest: (chunks,) int64, at most the first key that any query of the chunk sees.
    """

    first: Tensor
    until: Tensor | None
    lowest: Tensor


def plain_mask(mask: AttentionMask, B: int, T: int, S: int, device: torch.device) -> Tensor | SeenKeys | None:
    """`mask` for `ops.attention`: what `sdpa_mask` gives, and `SeenKeys` of more booleans than `BOOLEANS`."""
    narrow = mask.window is not None and mask.window < S
    masked = narrow or mask.packed or T not in (S, 1)
    if not mask.causal or not masked or (B if mask.packed else 1) * T * S <= BOOLEANS:
        return sdpa_mask(mask, B, T, S, device)
    query = torch.arange(S - T, S, device=device)
    first = torch.zeros_like(query) if not narrow else (query - (mask.window or 0) + 1).clamp(min=0)
    first = first[None]  # (1, T)
    if mask.documents is not None:
        token = torch.arange(B * T, device=device)
        begins = mask.documents.long()[torch.searchsorted(mask.documents, token, right=True) - 1]
        own_row = begins.view(B, T) - torch.arange(0, B * T, T, device=device)[:, None]
        first = torch.maximum(first, own_row)  # of a document that began in a row before, 0 or a later one
    lowest = first[:, ::CHUNK].amin(0)
    if mask.tree is not None:
        lasts = (mask.tree[:, None] > query[::CHUNK, None]).any(0)  # (chunks, S)
        lowest = torch.maximum(lowest, lasts.int().argmax(1)).minimum(query[::CHUNK])
    return SeenKeys(first, mask.tree, lowest)


def attention_in_chunks(q: Tensor, k: Tensor, v: Tensor, bounds: SeenKeys) -> Tensor:
    """`ops.attention` under `bounds`."""
    q, k, v = (y.to(product_dtype(v)) for y in (q, k, v))
    return torch.ops.regpt.attention_in_chunks(q, k, v, *bounds)[0]


def chunks(bounds: SeenKeys, T: int, S: int, rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, at most `rows`, their keys, and which are seen: (B or 1, 1, queries, keys) bool."""
    first, until, lowest = bounds
    key = torch.arange(S, device=first.device)
    for number, low in enumerate(lowest.tolist()):  # waits for the device
        for start in range(number * CHUNK, min(T, (number + 1) * CHUNK), rows):
            end = min(T, (number + 1) * CHUNK, start + rows)
            queries, keys = slice(start, end), slice(low // KEY_MULTIPLE * KEY_MULTIPLE, S - T + end)
            own = key[S - T + start : S - T + end, None]
            seen = (key[keys] <= own) & (key[keys] >= first[:, queries, None])  # (B or 1, queries, keys)
            if until is not None:
                seen = seen & (own < until[:, None, keys])
            yield queries, keys, seen[:, None]


def forward(q: Tensor, k: Tensor, v: Tensor, *bounds: Any) -> tuple[Tensor, Tensor]:
    """Output, and on the CPU the log of each softmax's sum."""
    (B, H, T, _), S, on_cpu = q.shape, k.size(2), has_kernels(q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    stats = q.new_empty((B, H, T) if on_cpu else 0, dtype=wide(q.dtype))
    k, v = (y.repeat_interleave(H // y.size(1), dim=1) if y.size(1) != H else y for y in (k, v))
    for queries, keys, seen in chunks(SeenKeys(*bounds), T, S, CHUNK):
        parts = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        if on_cpu:
            found = aten._scaled_dot_product_flash_attention_for_cpu(*parts, attn_mask=bias(seen, q.dtype))
            out[:, :, queries], stats[:, :, queries] = found
        else:
            out[:, :, queries] = F.scaled_dot_product_attention(*parts, attn_mask=seen)
    return out, stats


def has_kernels(device: torch.device) -> bool:
    """Whether torch's kernels that return what their backward needs take every format and mask."""
    return device.type == "cpu"


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *bounds: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, _), (G, S) = q.shape, k.shape[1:3]
    on_cpu = has_kernels(q.device)
    rows = CHUNK if on_cpu else max(LEAST, min(CHUNK, PIECE // (B * H * S)))
    k, v = (y.repeat_interleave(H // G, dim=1) if G != H else y for y in (k, v))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(y, dtype=wide(y.dtype), memory_format=torch.contiguous_format) for y in (k, v))
    for queries, keys, seen in chunks(SeenKeys(*bounds), T, S, rows):
        given = dout[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys]
        if on_cpu:
            kept = out[:, :, queries], stats[:, :, queries]
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, *kept, 0.0, False, attn_mask=bias(seen, q.dtype)
            )
        else:
            found = gradients(*given, seen)
        dq[:, :, queries] = found[0]
        dk[:, :, keys] += found[1]
        dv[:, :, keys] += found[2]
    dk, dv = (y.unflatten(1, (G, H // G)).sum(2).to(q.dtype) for y in (dk, dv))
    return dq, dk, dv


def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries q and keys and values k, v, by hand (Dao et al. 2022, appendix B.2)."""
    scale, format = 1 / math.sqrt(q.size(-1)), wide(q.dtype)
    scores = (q @ k.mT).to(format).mul_(scale).masked_fill_(~seen, -math.inf)  # (B, H, n, m)
    P = scores.softmax(-1)
    dP = (dout @ v.mT).to(format)
    dS = (dP - (dP * P).sum(-1, keepdim=True)).mul_(P).mul_(scale).to(q.dtype)
    return dS @ k, dS.mT @ q, P.to(q.dtype).mT @ dout


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.regpt.attention_in_chunks_backward(dout.contiguous(), *ctx.saved_tensors), None, None, None


def outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    stats = q.new_empty(q.shape[:3] if has_kernels(q.device) else 0, dtype=wide(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), stats


def empty_gradients(dout: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in given[:3])


NAME, QKV, BOUNDS = "attention_in_chunks", "Tensor q, Tensor k, Tensor v", "Tensor first, Tensor? until, Tensor lowest"
KEPT = f"{QKV}, Tensor out, Tensor stats"
LIBRARY.define(f"{NAME}({QKV}, {BOUNDS}) -> (Tensor, Tensor)")
LIBRARY.define(f"{NAME}_backward(Tensor dout, {KEPT}, {BOUNDS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl(NAME, forward, "CompositeExplicitAutograd")
LIBRARY.impl(f"{NAME}_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"regpt::{NAME}", outputs, lib=LIBRARY)
torch.library.register_fake(f"regpt::{NAME}_backward", empty_gradients, lib=LIBRARY)
torch.library.register_autograd(f"regpt::{NAME}", differentiate, setup_context=keep, lib=LIBRARY)
