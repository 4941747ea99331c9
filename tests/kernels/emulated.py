"""The two kernels of `kernels.masked` on a CPU, in any precision: one document after the other, each on its own."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from regpt.kernels import masked
from regpt.kernels.attention import AttentionShape


def probabilities(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """(H, n, n) of one text: q and k (n, H, D)."""
    n, _, D = q.shape
    far = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (far < 0) if window is None else (far < 0) | (far >= window)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> Tensor:
    """(B·T, H, D) from q (B·T, H, D) and k, v (B·T, G, D)."""
    k, v = (y.repeat_interleave(q.size(1) // y.size(1), dim=1) for y in (k, v))
    parts = [slice(a, b) for a, b in pairwise(documents.tolist())]
    return torch.cat([torch.einsum("hij,jhd->ihd", probabilities(q[one], k[one], window), v[one]) for one in parts])


def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> list[Tensor]:
    """Of q, k and v, by hand (Dao et al. 2022, appendix B.2), as nothing is recorded beneath autograd."""
    G, times = k.size(1), q.size(1) // k.size(1)
    k, v = (y.repeat_interleave(times, dim=1) for y in (k, v))
    found = []
    for a, b in pairwise(documents.tolist()):
        P = probabilities(q[a:b], k[a:b], window)
        dP = torch.einsum("ihd,jhd->hij", dout[a:b], v[a:b])
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) / math.sqrt(q.size(-1))
        dq, dk = torch.einsum("hij,jhd->ihd", dS, k[a:b]), torch.einsum("hij,ihd->jhd", dS, q[a:b])
        found.append((dq, dk, torch.einsum("hij,ihd->jhd", P, dout[a:b])))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found))
    return [dq, *(y.unflatten(1, (G, times)).sum(2) for y in (dk, dv))]


def rows(B: int, T: int) -> Tensor:
    return torch.arange(0, B * T + 1, T)


class EmulatedCudnn:
    """`CudnnAttention` for shapes that are not packed."""

    def attend(self, shape: AttentionShape, qkv: tuple[Tensor, ...], documents: Tensor | None):
        q, k, v = (y.flatten(0, 1) for y in qkv)
        cuts = rows(shape.B, shape.T) if documents is None else documents
        out = by_document(q, k, v, cuts, shape.window).view(shape.B, shape.T, shape.C)
        sizes = (shape.B, shape.H, shape.T, 1) if documents is None else (shape.B * shape.T, shape.H)
        return out, torch.zeros(sizes)

    def differentiate(self, shape: AttentionShape, qkv: Any, results: Any, into: Any, documents: Tensor | None) -> None:
        cuts = rows(shape.B, shape.T) if documents is None else documents
        dout = results[0].view(shape.B * shape.T, shape.H, shape.D)
        found = gradients(dout, *(y.flatten(0, 1) for y in qkv), cuts, shape.window)
        for tensor, gradient in zip(into, found):
            tensor.copy_(gradient.view_as(tensor))


def flash_forward(q, k, v, documents, _, T, *args, window_size_left=None, window_size_right=None, **kwargs):
    assert window_size_right == (None if window_size_left is None else 0)
    window = None if window_size_left is None else window_size_left + 1
    cuts = rows(q.size(0), T) if documents is None else documents
    flat = [y if y.dim() == 3 else y.flatten(0, 1) for y in (q, k, v)]
    out = by_document(*flat, cuts, window).view_as(q)
    none = torch.zeros(0)
    return out, q.new_zeros(q.shape[:-1], dtype=torch.float32), none, none.clone(), none.clone()


def flash_backward(dout, q, k, v, out, lse, documents, _, T, *args, window_size_left=None, **kwargs):
    window = None if window_size_left is None else window_size_left + 1
    cuts = documents if q.dim() == 3 else rows(q.size(0), T)
    flat = [y if y.dim() == 3 else y.flatten(0, 1) for y in (dout, q, k, v)]
    return tuple(g.view_as(y) for g, y in zip(gradients(*flat, cuts, window), (q, k, v)))


@contextmanager
def emulated(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both kernels work on a CPU, and in float64."""
    patch.setattr(masked, "HALF", (torch.float64, torch.float32, *masked.HALF))
    patch.setattr(masked, "HEAD_MULTIPLE", 1)
    patch.setattr(masked, "cudnn_on", lambda device: EmulatedCudnn())
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield
