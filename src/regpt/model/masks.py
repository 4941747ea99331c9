"""Attention masks as data, and their translation for `scaled_dot_product_attention`.

Every attention implementation translates an `AttentionMask` for itself, once a forward, or refuses it in one sentence:
`sdpa_mask` here, `plain_mask` in `chunked`, `cudnn_documents` in `kernels.attention`, `band` in `kernels.masked`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees: those that every condition allows.

    Attributes:
        causal: no keys after the query's own position.
        window: only keys fewer than `window` positions away, so 1 is the query's own (Beltagy et al. 2020, section
            3.1); None is no limit.
        documents: (documents + 1,) int, cumulative lengths from 0 to B·T: only keys of the query's own document.
        tree: (B, T) int, where in its row a token stops being seen: query i sees key j while i < tree[b, j]. So texts
            that share a beginning share a row, each a branch that does not see the others.

    Raises:
        ValueError: a window below 1.
    """

    causal: bool = True
    window: int | None = None
    documents: Tensor | None = None
    tree: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"the attention window is {self.window}, must be at least 1")

    @property
    def packed(self) -> bool:
        """Whether rows hold several texts, each with positions of its own."""
        return self.documents is not None or self.tree is not None


CAUSAL = AttentionMask()


def sdpa_mask(mask: AttentionMask, B: int, T: int, S: int, device: torch.device) -> Tensor | None:
    """`mask` for `ops.attention`: bool, broadcastable to (B, H, T, S), True where a query sees a key; the queries are
    the last T of S positions. None where it is causal and no more, which `ops.attention` computes without a mask.

    Known limit: a mask keeps `scaled_dot_product_attention` off its flash path; documents and trees take B·T² booleans.
    So `chunked.plain_mask` gives small masks alone to it, and `kernels.masked` none on NVIDIA GPUs.
    """
    window = mask.window if mask.window is not None and mask.window < S else None
    if mask.causal and window is None and not mask.packed:
        return None
    query, key = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)  # (T, 1), (S,)
    seen = key <= query if mask.causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & ((query - key).abs() < window)  # (T, S)
    if mask.documents is not None:
        token = torch.arange(B * T, device=device)
        document = torch.searchsorted(mask.documents, token, right=True).view(B, 1, T)
        seen = seen & (document[..., None] == document[:, :, None])  # (B, 1, T, T)
    if mask.tree is not None:
        seen = seen & (query < mask.tree[:, None, None])  # (B, 1, T, T)
    return seen


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) bool: the last T of S positions, each sees itself and those before."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
