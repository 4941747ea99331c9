"""The plainest cache that a model's layers accept: one tensor of keys and one of values, all positions in order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regpt.model.config import ModelConfig


class KVCache:
    """Room for `capacity` positions of `batch` sequences in every layer. For inference: it is written in place.

    `length` is the number of positions that hold tokens; the model advances it after each call, and setting it back
    drops the later ones.
    """

    ragged = False

    def __init__(self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype):
        config = config.resolved()
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_size)  # (L, B, G, S, D)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k.size(-2)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, attention: Callable[..., Tensor]
    ) -> Tensor:
        return attention(q, *self.append(layer, k, v), mask)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` (B, G, T, D) after the tokens of `layer`; return all of them, (B, G, S, D) views.

        Raises:
            ValueError: another number of sequences, or more positions than fit.
        """
        end = self.length + k.size(-2)
        if k.size(0) != self.k.size(1):
            raise ValueError(f"{k.size(0)} sequences do not fit into a cache of {self.k.size(1)}")
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit into a cache of {self.capacity}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]
