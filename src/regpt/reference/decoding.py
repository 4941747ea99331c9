"""Choosing the next token: filters of a distribution, a cache of keys and values, and speculation that changes nothing.

NumPy only. Shapes: V vocabulary, T time, D head size; p and q are distributions (V,).
"""

import math

import numpy as np

from regpt.reference.gpt2 import Array, softmax


def top_k(logits: Array, k: int) -> Array:
    """-∞ but for the k largest (Fan et al. 2018); ties with the k-th stay."""
    return np.where(logits >= np.sort(logits)[-k], logits, -np.inf)


def top_p(logits: Array, p: float) -> Array:
    """-∞ but for the smallest set of most probable tokens whose probabilities reach p (Holtzman et al. 2020): few where
    the model is sure, many where it is not."""
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    return np.where(np.isin(np.arange(len(logits)), order[before < p]), logits, -np.inf)


def next_token(logits: Array, u: float, temperature: float = 1.0) -> int:
    """The token of softmax(logits/temperature) at the point u in [0, 1) of its distribution function. A temperature
    below 1 sharpens: at 0 all probability lies on the largest."""
    if temperature == 0:
        return int(logits.argmax())
    return int(np.searchsorted(np.cumsum(softmax(logits / temperature)), u, side="right").clip(max=len(logits) - 1))


def attend_next(q: Array, k: Array, v: Array, cache: list[tuple[Array, Array]]) -> Array:
    """Attention of one new position, q, k, v (D,): its key and value join `cache`, and those of all earlier ones are
    read from it. They depend on earlier tokens alone, so nothing is computed twice: T products of a row in place of
    T²."""
    cache.append((k, v))
    keys, values = (np.stack(part) for part in zip(*cache))  # (T, D)
    return softmax(keys @ q / math.sqrt(len(q))) @ values


def residual(p: Array, q: Array) -> Array:
    """max(p - q, 0), made a distribution: what p still wants after q's draft was refused."""
    rest = np.maximum(p - q, 0)
    return rest / rest.sum() if rest.sum() else p


def speculate(p: Array, q: Array, u: tuple[float, float, float]) -> int:
    """One token with the distribution p, drawn through the cheaper q (Leviathan et al. 2023, section 2.3).

    The draft x from q is taken with chance min(1, p(x)/q(x)), else a token from `residual` is. Token x then comes with
    chance min(q, p)(x) + [1 - Σ min(q, p)]·residual(x) = min(q, p)(x) + max(p - q, 0)(x) = p(x): exactly p, whatever q
    is; a bad draft costs time alone.

    Args:
        u: three uniform numbers in [0, 1): of the draft, of its acceptance, of the replacement.
    """
    draft = next_token(np.log(np.maximum(q, 1e-300)), u[0])
    if u[1] < min(1.0, p[draft] / q[draft]):
        return draft
    return next_token(np.log(np.maximum(residual(p, q), 1e-300)), u[2])


def accepted_share(p: Array, q: Array) -> float:
    """Σ min(p, q), the chance that a draft is taken: 1 minus the total variation distance of the two."""
    return float(np.minimum(p, q).sum())
