"""Layers that GPT-2 and Llama share with their relatives, forward and backward, written out in NumPy.

Activations, softmax with and without its stability, attention with windows, documents, grouped queries and dropout, a
mixture of experts, low-rank adapters, and the loss of DPO. The convention is that of `reference.gpt2`: `layer(x, …) ->
(y, saved)` and `layer_backward(dy, saved) -> gradients of the inputs, in their order`. Shapes: B batch, T time, H heads
of queries, G of keys and values, D head size, N tokens, E experts.
"""

import math

import numpy as np

from regpt.reference.gpt2 import Array, Params, Saved, inside, named, softmax
from regpt.reference.llama import mlp, mlp_backward

ERF = np.vectorize(math.erf, otypes=[float])  # NumPy has none


# ---- activations -----------------------------------------------------------------------------------------------------


def gelu_exact(x: Array) -> tuple[Array, Saved]:
    """y = x·Φ(x), Φ the distribution function of N(0, 1): x times the chance that a standard normal number is below x
    (Hendrycks & Gimpel 2016, eq. 1). GPT-2 has the tanh form, which differs by at most 5·10⁻⁴."""
    below = 0.5 * (1 + ERF(x / math.sqrt(2)))
    return x * below, (x, below)


def gelu_exact_backward(dy: Array, saved: Saved) -> Array:
    """Product rule with Φ′ = φ, the density: dy/dx = Φ(x) + x·φ(x), φ(x) = exp(-x²/2)/√(2π)."""
    x, below = saved
    return dy * (below + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))


def relu_squared(x: Array) -> tuple[Array, Saved]:
    """y = max(x, 0)² (So et al. 2021, "Primer"): as cheap as ReLU, and smooth where it begins."""
    positive = np.maximum(x, 0)
    return positive**2, (positive,)


def relu_squared_backward(dy: Array, saved: Saved) -> Array:
    """dy/dx = 2·max(x, 0)."""
    return dy * 2 * saved[0]


# ---- softmax ---------------------------------------------------------------------------------------------------------


def naive_softmax(x: Array) -> Array:
    """exp(x_i) / Σ_j exp(x_j) as the formula stands. In float32 exp(89) is infinite, and infinity by infinity is not a
    number; exp(-104) is 0, and a row of such scores has a sum of 0.

    `reference.gpt2.softmax` subtracts the maximum m first. That is exact, not an approximation, since exp(x_i - m) =
    exp(x_i)·exp(-m) and the factor exp(-m) stands above and below the line. The largest term is then exp(0) = 1: the
    sum lies between 1 and the number of terms, and what underflows was smaller than rounding anyway.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        e = np.exp(x)
        return e / e.sum(-1, keepdims=True)


def log_softmax(x: Array) -> tuple[Array, Saved]:
    """log p_i = x_i - m - log Σ_j exp(x_j - m) over the last dimension. Not the logarithm of softmax: a probability
    that underflows to 0 has the logarithm -∞, while x_i - m is an ordinary number."""
    shifted = x - x.max(-1, keepdims=True)
    y = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return y, (y,)


def log_softmax_backward(dy: Array, saved: Saved) -> Array:
    """∂ log p_i/∂x_j = δ_ij - p_j, so dx_j = dy_j - p_j·Σ_i dy_i."""
    return dy - np.exp(saved[0]) * dy.sum(-1, keepdims=True)


# ---- attention -------------------------------------------------------------------------------------------------------


def visible_positions(T: int, window: int | None = None, documents: Array | None = None) -> Array:
    """Which positions a query may see: (T, T) bool, or (B, 1, T, T) with `documents`.

    Position t sees s where s ≤ t (causal), s > t - window (Beltagy et al. 2020), and both are in one document.

    Args:
        documents: (B, T) int, the number of the document that each token is from.
    """
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = s <= t
    if window is not None:
        seen = seen & (s > t - window)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen


def masked_attention(q: Array, k: Array, v: Array, seen: Array, kept: Array | None = None) -> tuple[Array, Saved]:
    """y = (kept·softmax(q·kᵀ/√D))·v; q (B, H, T, D), k and v (B, G, T, D), y as q.

    Query head h reads key head h·G // H (Ainslie et al. 2023). `kept` is dropout on the weights (Vaswani et al. 2017
    apply it so): factors 1/(1 - rate) or 0 of shape (B, H, T, T). It stands after the softmax, so the weights of a
    query no longer add up to 1; only their expectation does. Dropped before the softmax, the other weights would grow
    to fill the gap, and the expectation of y would be another one.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)  # (B, H, T, D)
    p = softmax(np.where(seen, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf))
    used = p if kept is None else p * kept
    return used @ v, (q, k, v, p, kept, repeat)


def masked_attention_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """As `reference.gpt2.attention_backward`, with two additions: dp = kept·(dy·vᵀ), since dropout is a factor, and a
    key head gets the sum over the query heads that read it. A masked score has p = 0, and so no gradient."""
    q, k, v, p, kept, repeat = saved
    used = p if kept is None else p * kept
    dp = dy @ v.swapaxes(-1, -2) * (1 if kept is None else kept)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dk, dv = ds.swapaxes(-1, -2) @ q, used.swapaxes(-1, -2) @ dy
    B, H, T, D = dk.shape
    dk, dv = (y.reshape(B, H // repeat, repeat, T, D).sum(2) for y in (dk, dv))  # (B, G, T, D)
    return ds @ k, dk, dv


def dropout(x: Array, kept: Array, rate: float) -> tuple[Array, Saved]:
    """y = x·kept/(1 - rate), `kept` 0 or 1 with chance 1 - rate (Srivastava et al. 2014). Divided while training, so
    that E[y] = x and nothing is to be done at use."""
    return x * kept / (1 - rate), (kept, rate)


def dropout_backward(dy: Array, saved: Saved) -> Array:
    """The same factors: what was dropped gets no gradient."""
    kept, rate = saved
    return dy * kept / (1 - rate)


# ---- experts ---------------------------------------------------------------------------------------------------------


def experts(x: Array, w: Params, k: int, norm_topk: bool = True) -> tuple[Array, Saved]:
    """y_n = Σ over the k experts e of token n of weight_ne·MLP_e(x_n) (Jiang et al. 2024, section 2.1); x (N, C).

    A router gives each token a softmax over all E experts; its k largest shares choose, and are the weights, divided by
    their sum with `norm_topk`. `w`: `gate.weight` (E, C) and of each expert e Llama's `e.gate_proj.weight`, ….
    """
    shares = softmax(x @ w["gate.weight"].T)  # (N, E)
    chosen = np.argsort(-shares, axis=-1, kind="stable")[:, :k]  # (N, k)
    picked = np.take_along_axis(shares, chosen, axis=-1)
    total = picked.sum(-1, keepdims=True) if norm_topk else np.ones((len(x), 1))
    weights = picked / total
    y, kept = np.zeros_like(x), {}
    for e in range(shares.shape[1]):
        token, place = np.nonzero(chosen == e)
        out, saved_mlp = mlp(x[token], inside(f"{e}.", w))
        y[token] += weights[token, place, None] * out
        kept[e] = token, place, out, saved_mlp
    return y, (x, w["gate.weight"], shares, chosen, weights, total, kept, norm_topk)


def experts_backward(dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
    """An expert gets weight·dy of its own tokens. A weight gets dy·MLP(x), and through weight = share/total the change
    (dweight - Σ dweight·weight)/total, zero along a scaling of all k; then the softmax, in which also the experts that
    were not chosen take part. The choice itself is a step and has no gradient: a router learns only from the experts
    that it chose, so those that it never chooses stay bad (which balance losses, or biases of the choice, are for).
    """
    x, router, shares, chosen, weights, total, kept, norm_topk = saved
    grads: dict[str, Array] = {}
    dx, dweights = np.zeros_like(x), np.zeros_like(weights)
    for e, (token, place, out, saved_mlp) in kept.items():
        dweights[token, place] = (dy[token] * out).sum(-1)
        part, mlp_grads = mlp_backward(weights[token, place, None] * dy[token], saved_mlp)
        dx[token] += part  # a token has an expert once, so no index repeats here
        grads |= named(f"{e}.", mlp_grads)
    dpicked = (dweights - norm_topk * (dweights * weights).sum(-1, keepdims=True)) / total
    dshares = np.zeros_like(shares)
    np.put_along_axis(dshares, chosen, dpicked, axis=-1)
    dlogits = shares * (dshares - (dshares * shares).sum(-1, keepdims=True))
    grads["gate.weight"] = dlogits.T @ x
    return dx + dlogits @ router, grads


# ---- adapters and preferences ----------------------------------------------------------------------------------------


def lora(x: Array, w: Array, a: Array, b: Array, scale: float) -> tuple[Array, Saved]:
    """y = x·wᵀ + scale·(x·aᵀ)·bᵀ with w frozen (Hu et al. 2021, eq. 3); x (N, I), w (O, I), a (r, I), b (O, r).

    The product b·a has the shape of w and rank r at most: r·(I + O) numbers in place of I·O. b starts at 0, so that the
    model begins as it was.
    """
    low = x @ a.T  # (N, r)
    return x @ w.T + scale * low @ b.T, (x, w, a, b, low, scale)


def lora_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dx, da and db; w gets none, and needs no moments of an optimizer, which is where the memory is saved.

    db = scale·dyᵀ·(x·aᵀ) and da = scale·(dy·b)ᵀ·x. With b = 0 the first update moves b alone, as da = 0.
    """
    x, w, a, b, low, scale = saved
    dlow = scale * dy @ b  # (N, r)
    return dy @ w + dlow @ a, dlow.T @ x, scale * dy.T @ low


def dpo_loss(chosen: Array, rejected: Array, reference: tuple[Array, Array], beta: float) -> tuple[float, Saved]:
    """The mean over pairs of -log σ(β·margin), margin = (chosen - its reference) - (rejected - its reference) (Rafailov
    et al. 2023, eq. 7). All are sums of log-probabilities of the answer's tokens, (P,). At the reference itself the
    margin is 0 and the loss log 2."""
    margin = (chosen - reference[0]) - (rejected - reference[1])
    return float(np.logaddexp(0, -beta * margin).mean()), (margin, beta)


def dpo_loss_backward(saved: Saved) -> tuple[Array, Array]:
    """dchosen = -β·σ(-β·margin)/P, drejected its negative. A pair ranked right with a wide margin weighs little; both
    log-probabilities may fall, as long as the rejected one falls faster: only their difference is held."""
    margin, beta = saved
    dmargin = -beta / (1 + np.exp(beta * margin)) / len(margin)
    return dmargin, -dmargin
