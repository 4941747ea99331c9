"""Counter-based dropout: a mask is a pure function of the row's key, the site and the index, in integers.

There is no generator state: a repeated step (after a resume, an out-of-memory retry, in activation checkpointing) has
the same masks on every device, however micro-batches and processes divide its rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # computations are in 32 bits of an int64: torch has no products of unsigned integers
GOLDEN = 0x9E3779B9  # 2³² / golden ratio: spreads site numbers over the word (Knuth, TAOCP 3, section 6.4)


class Dropout(NamedTuple):
    """Inverted dropout (Srivastava et al. 2014, section 10): each element is zero with probability `rate`, the others
    are scaled by 1 / (1 - rate), which preserves the mean.

    Attributes:
        rate: in [0, 1).
        keys: (B,) int64 below 2³², one a row, from `data.loader`; None drops nothing.
    """

    rate: float = 0.0
    keys: Tensor | None = None

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """`x` (B, …) after dropout; each `site` of the model has its own masks."""
        if self.keys is None:
            return x
        return x.masked_fill(self.dropped(x.shape, site), 0.0) * (1 / (1 - self.rate))

    def dropped(self, shape: torch.Size, site: int) -> Tensor:
        """The mask of a tensor of `shape` (B, …, n): bool, True where an element becomes zero."""
        assert self.keys is not None
        B, *between, n = shape
        row = mix((self.keys + site * GOLDEN) & WORD).view(B, *(1 for _ in between), 1)
        number = torch.arange(math.prod(between), device=row.device).view(*between, 1)
        vector = mix(row ^ number)  # (B, …, 1)
        return mix(vector ^ torch.arange(n, device=row.device)) < round(self.rate * 2**32)  # (B, …, n)


OFF = Dropout()


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit depends on all (Wellons 2018, `lowbias32`); int64 in and out."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & WORD  # the same low 32 bits, and no product beyond int64
    return x ^ (x >> 16)
