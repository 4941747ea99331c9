"""(SEED, POSITION, TOKEN) → NOISE: a counter-based generator (Salmon et al. 2011), so that nothing is drawn in order.

The noise of a token is a function of the text's seed, the token's position in it and its id: whatever else is in the
batch, and wherever it is computed, it stays the same. Only integer operations and IEEE-exact float64 ones (+, -, ×, ÷)
are used, each an operation of its own: CPU and GPU agree bit for bit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regpt.errors import UsageError

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B1  # a prime near 2³² / φ (Knuth, TAOCP 3, section 6.4)
GOLDEN_64 = 0x9E3779B97F4A7C15
SERIES = [1 / n for n in range(13, 0, -2)]  # of atanh(s) / s in s², to 1e-10 for |s| ≤ 0.172


def finalize(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby 2011), a bijection; values of 32 bits in int64."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def split_seeds(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds as (B, 2) int64: the low and the high 32 bits of each.

    Raises:
        UsageError: a seed below 0 or of more than 64 bits.
    """
    for seed in seeds:
        check_seed(seed)
    return torch.tensor([[seed & MASK, seed >> 32] for seed in seeds], device=device).view(-1, 2)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise UsageError(f"the seed is {seed}, must be between 0 and {2**64 - 1}")


def choice_seed(seed: int, choice: int) -> int:
    """Seed of the text number `choice` of a request: its own for the first."""
    return (seed + choice * GOLDEN_64) % 2**64


def random_bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits in int64 (B, K) for seeds (B, 2), positions (B,) and token ids (B, K) or (K,), all int64."""
    low, high = seeds[:, 0], seeds[:, 1]
    at = finalize(positions * GOLDEN + 0x5851F42D & MASK)
    first = finalize((finalize(low ^ at) + high) & MASK)  # (B,)
    second = finalize((finalize(high ^ 0xA511E9B3) + (low ^ finalize(at ^ 0x2545F491))) & MASK)
    x = finalize((tokens * GOLDEN & MASK) ^ first[:, None])
    return finalize((x + second[:, None]) & MASK)


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise -ln(-ln u), float32 (B, K); arguments as in `random_bits`.

    The argmax of logits + noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014). Between -3.2 and 23.
    """
    u = (random_bits(seeds, positions, tokens).double() + 0.5) * 2.0**-32  # exact, in (0, 1)
    return logarithm(logarithm(u).neg()).neg().float()


def logarithm(x: Tensor) -> Tensor:
    """ln x of positive normal float64, to 1e-10, from operations that round alike everywhere."""
    bits = x.view(torch.int64)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)  # 1 ≤ m < 2
    large = mantissa > math.sqrt(2)
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent = ((bits >> 52) - 1023 + large).double()
    s = (mantissa - 1.0) / (mantissa + 1.0)  # ln m = 2 atanh(s)
    square, series = s * s, torch.full_like(s, SERIES[0])
    for coefficient in SERIES[1:]:
        series = series * square
        series = series + coefficient
    series = series * s
    return exponent * math.log(2) + series * 2.0
