"""LOGITS → TOKEN: pure functions; the only randomness is the given generator."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regpt.errors import UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; the defaults are the lecture's (and Hugging Face's pipeline's)."""

    temperature: float = 1.0
    """Logits are divided by it: below 1 sharper, above 1 flatter."""
    top_k: int = 50
    """Draw from the k likeliest tokens (Fan et al. 2018, section 5.4); 0 from all, 1 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (Holtzman et al. 2020, eq. 3); 1 from all."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:  # NaN fails too
            raise UsageError(f"temperature is {self.temperature}, must be above 0 and finite; top-k 1 samples greedily")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}, must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, must be above 0 and at most 1 (all tokens)")


def sample(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """One token id a row, (B,) int64, from `logits` (B, V).

    With `top_k` 1 it is the likeliest token, without a draw. Otherwise each call draws once from `generator`, which is
    on the device of `logits`; torch's global random state is never used.
    """
    if options.top_k == 1:
        return logits.argmax(dim=-1)
    probs = torch.softmax(filter_logits(logits, options), dim=-1)  # (B, V)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(-1)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (B, V) of the distribution that `sample` draws from: temperature, then top-k, then top-p.

    Excluded tokens are -inf. Float32, or float64 for float64 `logits`. Among equal logits at the edge of top-k or
    top-p, which ones are kept is not specified; how many is.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # The maximum is subtracted before the division: a tiny temperature then gives -inf, never inf - inf. One that
    # rounds to zero or to infinity in the logits' type would give 0 / 0 or inf / inf.
    limits = torch.finfo(logits.dtype)
    temperature = min(max(options.temperature, limits.tiny), limits.max)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return keep_top_p(keep_top_k(logits, options.top_k), options.top_p)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """`logits` (B, V) with all but the `k` largest of each row at -inf; 0, or k ≥ V, keeps all."""
    if not 0 < k < logits.size(-1):
        return logits
    values, ids = logits.topk(k, dim=-1)  # (B, k)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """`logits` (B, V) with each row cut to its nucleus, the fewest likeliest tokens of total probability ≥ `p`."""
    if p >= 1:
        return logits
    ordered, ids = logits.sort(dim=-1, descending=True)  # (B, V)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # (B, V), probability of the likelier tokens
    left_out = before >= p
    left_out[..., 0] = False  # the likeliest stays, also where p rounds to 0 in float32
    return torch.empty_like(logits).scatter(-1, ids, ordered.masked_fill(left_out, -math.inf))
