"""How weights move: the classic optimizers from their papers, schedules, and the divisor of accumulated gradients.

An optimizer is a function of one parameter: `rule(p, g, state, step, lr) -> (p, state)`, where `state` holds arrays of
p's shape (none before the first update) and `step` counts from 1. AdamW and its schedule are in `reference.adamw`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from regpt.reference.adamw import adamw
from regpt.reference.gpt2 import Array

State = dict[str, Array]
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024, "Muon"


# ---- which examples a gradient is of ---------------------------------------------------------------------------------


def mini_batches(n: int, size: int, rng: np.random.Generator) -> Iterator[Array]:
    """Indices of one epoch in batches: `size` n is gradient descent, 1 stochastic gradient descent (Robbins & Monro
    1951), anything between mini-batches. Each example once; a batch's mean gradient has that of all as its expectation,
    and a standard error that falls with √size, while its cost grows with size."""
    order = rng.permutation(n)
    for first in range(0, n, size):
        yield order[first : first + size]


def accumulated(sums: Sequence[Array], counts: Sequence[int]) -> Array:
    """Gradient of a step from those of its micro-batches: Σ sums / Σ counts, each sum over `count` valid targets."""
    return sum(sums[1:], sums[0]) / sum(counts)


def accumulated_wrongly(sums: Sequence[Array], counts: Sequence[int]) -> Array:
    """The mean of the micro-batches' means, as widespread as wrong: a target in a short micro-batch counts for more.
    Equal to `accumulated` only where all counts are equal, which padding and answers of other lengths see to."""
    means = [total / count for total, count in zip(sums, counts)]
    return sum(means[1:], means[0]) / len(means)


# ---- rules -----------------------------------------------------------------------------------------------------------


def sgd(p: Array, g: Array, state: State, step: int, lr: float) -> tuple[Array, State]:
    """p ← p - lr·g: the steepest way down, as far as the slope is long."""
    return p - lr * g, state


def momentum(
    p: Array, g: Array, state: State, step: int, lr: float, mu: float = 0.9, nesterov: bool = False
) -> tuple[Array, State]:
    """m ← μ·m + g, p ← p - lr·m (Polyak 1964): what points the same way adds up to 1/(1 - μ) of it, what flips cancels.

    Nesterov (1983; in this form Sutskever et al. 2013) steps by g + μ·m, the slope that m will have led to.
    """
    m = mu * state.get("m", 0 * p) + g
    return p - lr * (g + mu * m if nesterov else m), {"m": m}


def nesterov(p: Array, g: Array, state: State, step: int, lr: float, mu: float = 0.9) -> tuple[Array, State]:
    return momentum(p, g, state, step, lr, mu, nesterov=True)


def adagrad(p: Array, g: Array, state: State, step: int, lr: float, eps: float = 1e-10) -> tuple[Array, State]:
    """v ← v + g², p ← p - lr·g/(√v + eps) (Duchi et al. 2011): a rate for each weight, small where gradients were
    large. v only grows, so every rate falls to 0: good for sparse features, an early end for a network."""
    v = state.get("v", 0 * p) + g**2
    return p - lr * g / (np.sqrt(v) + eps), {"v": v}


def rmsprop(
    p: Array, g: Array, state: State, step: int, lr: float, alpha: float = 0.99, eps: float = 1e-8
) -> tuple[Array, State]:
    """v ← α·v + (1 - α)·g² in place of Adagrad's sum (Hinton 2012, lecture 6e): it forgets, so rates recover."""
    v = alpha * state.get("v", 0 * p) + (1 - alpha) * g**2
    return p - lr * g / (np.sqrt(v) + eps), {"v": v}


def adam(
    p: Array, g: Array, state: State, step: int, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> tuple[Array, State]:
    """Momentum over RMSProp, both divided by what they lack after `step` updates from 0 (Kingma & Ba 2015, algorithm
    1).

    In the first update m̂ = g and v̂ = g²: a step of lr in every weight, whatever its gradient's size.
    """
    p, m, v = adamw(p, g, state.get("m", 0 * p), state.get("v", 0 * p), step, lr, beta1, beta2, eps, decay=0.0)
    return p, {"m": m, "v": v}


def lion(
    p: Array, g: Array, state: State, step: int, lr: float, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.0
) -> tuple[Array, State]:
    """p ← p·(1 - lr·decay) - lr·sign(β₁·m + (1 - β₁)·g), then m ← β₂·m + (1 - β₂)·g (Chen et al. 2023, algorithm 2).
    Every weight moves by lr: one moment instead of two, and rates three to ten times below Adam's."""
    m = state.get("m", 0 * p)
    p = p * (1 - lr * decay) - lr * np.sign(beta1 * m + (1 - beta1) * g)
    return p, {"m": beta2 * m + (1 - beta2) * g}


def newton_schulz(g: Array, steps: int = 5) -> Array:
    """The matrix g (O, I) with its singular values near 1 and its directions as they were: U·Vᵀ of g = U·S·Vᵀ, nearly.

    X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ acts on each singular value s as s ← a·s + b·s³ + c·s⁵ and leaves U and V
    alone. Its coefficients are not those that converge to 1 but those that grow small values fastest: five rounds
    bring everything from 0.01 to 1 to between 0.68 and 1.14 (Jordan et al. 2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (np.linalg.norm(x) + 1e-7)  # Frobenius, which is at least the largest singular value
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon(
    p: Array, g: Array, state: State, step: int, lr: float, mu: float = 0.95, decay: float = 0.0
) -> tuple[Array, State]:
    """Momentum, of which `newton_schulz` makes a step that is as long in every direction (Jordan et al. 2024), for
    matrices (O, I) of hidden layers. m ← μ·m + (1 - μ)·g, update from (1 - μ)·g + μ·m, times √max(1, O/I).

    A gradient is dominated by few directions; the others, small and as telling, get as large a step.
    """
    m = mu * state.get("m", 0 * p) + (1 - mu) * g
    update = newton_schulz((1 - mu) * g + mu * m) * math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
    return p * (1 - lr * decay) - lr * update, {"m": m}


RULES: dict[str, Callable[..., tuple[Array, State]]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
    "lion": lion,
    "muon": muon,
}


# ---- schedules -------------------------------------------------------------------------------------------------------


def trapezoid(step: int, *, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Factor of the learning rate: up in a line, flat, down in a line over the last `decay_steps` (Zhai et al. 2022;
    Hägele et al. 2024). The flat part may go on for as long as one likes, and a run of any length branches off it."""
    rising = step / warmup_steps if warmup_steps else 1.0
    falling = (steps - step + 1) / (decay_steps + 1) if decay_steps else 1.0
    return max(0.0, min(1.0, rising, falling))


def inverse_sqrt(step: int, *, warmup_steps: int) -> float:
    """min(step/warmup, √(warmup/step)), the first schedule of transformers (Vaswani et al. 2017, eq. 3)."""
    return min(step / warmup_steps, math.sqrt(warmup_steps / step))
