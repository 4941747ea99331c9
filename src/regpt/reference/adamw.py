"""AdamW, gradient clipping and the learning-rate schedule by hand, in NumPy: what happens after the backward pass."""

import math
from collections.abc import Mapping

import numpy as np

from regpt.errors import UserError

Array = np.ndarray
Params = Mapping[str, Array]

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s guard against a norm of zero


def adamw(
    p: Array, g: Array, m: Array, v: Array, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> tuple[Array, Array, Array]:
    """One update of one parameter: new p, m and v; `step` counts from 1 (Loshchilov & Hutter 2019, algorithm 2).

    m ← β₁·m + (1 - β₁)·g and v ← β₂·v + (1 - β₂)·g² are running means of g and g². Both start at 0, so after `step`
    updates they hold only a share 1 - βᵗ of a mean; m̂ and v̂ divide by it. Then p ← p·(1 - lr·decay) - lr·m̂/(√v̂ + eps).
    The decay stands outside the fraction ("decoupled"): a weight with large gradients decays as fast as any other.
    The paper multiplies the decay by a schedule of its own; PyTorch, and so GPT training, by the learning rate.
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


class ReferenceAdamW:
    """The running means of every parameter, and the update of all of them.

    Only tensors of two or more dimensions decay (GPT-3 paper, appendix B, with the usual reading): matrices and
    embeddings, not biases and LayerNorm weights.
    """

    def __init__(
        self, params: Params, *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1
    ):
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.steps = 0
        self.exp_avg = {name: np.zeros_like(p) for name, p in params.items()}
        self.exp_avg_sq = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, params: Params, grads: Params, lr: float) -> dict[str, Array]:
        """Parameters after the next update; `params` and `grads` are left as they are."""
        self.steps += 1
        updated: dict[str, Array] = {}
        for name, p in params.items():
            m, v = self.exp_avg[name], self.exp_avg_sq[name]
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            updated[name], self.exp_avg[name], self.exp_avg_sq[name] = adamw(
                p, grads[name], m, v, self.steps, lr, self.beta1, self.beta2, self.eps, decay
            )
        return updated


def clip_gradients(grads: Params, max_norm: float) -> tuple[dict[str, Array], float]:
    """Gradients times min(1, max_norm / (norm + 1e-6)), and norm = √(Σ of all squares) before (Pascanu et al. 2013).

    One norm over all parameters: the update's direction stays, its length is bounded.
    """
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    factor = min(1.0, max_norm / (norm + CLIP_EPS))
    return {name: g * factor for name, g in grads.items()}, norm


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int) -> float:
    """Learning rate of update `step`, counted from 1 (GPT-3 paper, appendix B).

    lr·step/warmup_steps up to the end of the warmup; then min_lr + (lr - min_lr)·(1 + cos(π·r))/2, where r counts the
    updates made since the warmup: 0 for the first one after it, 1 and the minimum once decay_steps are behind us.
    This is the lecture's rule, which counts updates from 0: its `it` is our step - 1.

    Raises:
        UserError: a step before the first.
    """
    if step < 1:
        raise UserError(f"step is {step}, must be at least 1: updates are counted from 1; add 1 to a count from 0")
    if step <= warmup_steps:
        return lr * step / warmup_steps
    done = step - 1
    if done >= decay_steps:
        return min_lr
    r = (done - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * r)) / 2
