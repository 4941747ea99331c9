"""What a model asks of keys and values of the tokens read so far: a new token costs one position, not all of them."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Cache(Protocol):
    """What the layers of every family ask of a cache. `engine.cache` has them, of pages.

    Attributes:
        length: positions before the tokens that the model is given, in every row.
        ragged: the tokens of several texts are one row (1, N), each text with positions of its own; the cache then
            takes `AttentionMask` itself as the mask.
    """

    length: int
    ragged: bool

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, attention: Callable[..., Tensor]
    ) -> Tensor:
        """Store `k` and `v` (B, G, T, D) of `layer` and return what the queries (B, H, T, D) find in it, alike.

        `attention` and `mask` are as in `ops.attention`, which caches may replace by something equal.
        """
        ...
