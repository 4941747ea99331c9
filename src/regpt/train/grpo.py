"""GRPO: policy gradients from rewards of the model's own replies (Shao et al. 2024, section 4.1), and its variants."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.model.head import losses_of_targets
from regpt.model.transformer import Transformer
from regpt.train.config import GrpoConfig
from regpt.train.objective import LARGEST, NextToken, Sums, valid_targets

# Largest difference of a log-probability between the engine's cached forward and the training step's, whose products
# have other shapes and so round differently: twenty times what was seen (docs/log.md, 2026-12-01). In half precision it
# is reported only.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-9}


def advantages(rewards: np.ndarray, loss: str) -> np.ndarray:
    """Of rewards (G, K) of K replies to each of G questions: by how much a reply is better than the mean of its group,
    in standard deviations; of `dr_grpo` not divided, because the division weighs questions that are nearly always, or
    nearly never, answered more than others (Liu et al. 2025, section 3.1). 0 where all rewards of a group are equal."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if loss == "dr_grpo":
        return centred
    spread = rewards.std(axis=1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)


def overlong_penalty(length: int, most: int, margin: int) -> float:
    """Of a reply of `length` tokens (Yu et al. 2025, equation 13): 0 up to `most` - `margin`, -1 at `most`."""
    return min(0.0, (most - margin - length) / margin) if margin else 0.0


class PolicyGradient:
    """The clipped surrogate of PPO (Schulman et al. 2017, equation 7) over drawn tokens, the one that ends a reply
    included; each row is a question and one reply.

    Args:
        model: computes the hidden states.
        config: normalisation and coefficients.
        most_tokens: of a reply; the head computes so many positions of a row, from the reply's first on.
    """

    def __init__(self, model: Transformer, config: GrpoConfig, most_tokens: int):
        self.model, self.config, self.most_tokens, self.plain = model, config, most_tokens, NextToken(model)

    def units(self, batches: Sequence[Batch]) -> int:
        """Replies; of `dapo` their tokens."""
        if self.config.loss == "dapo":
            return valid_targets(batches)
        return sum(int((batch.targets.numpy() != IGNORE_INDEX).any(axis=1).sum()) for batch in batches)

    def token_weights(self, drawn: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of each drawn token (B, R) bool in the sum over units. `grpo`: one over the reply's length, so that
        replies count alike, and a token of a long wrong one less; `dapo`: 1, all tokens alike (Yu et al. 2025, equation
        8); `dr_grpo`: one over the most that a reply may have, which depends on no length (Liu et al. 2025)."""
        counted = drawn.to(dtype)
        if self.config.loss == "dapo":
            return counted
        if self.config.loss == "dr_grpo":
            return counted / self.most_tokens
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1)

    def logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, R) of the drawn tokens at the temperature that they were drawn with, 0 after a reply's
        end; and which places are drawn tokens. R is `most_tokens`."""
        model, mask = self.model, batch.targets != IGNORE_INDEX
        hidden = model.hidden(batch.idx, positions=batch.positions, dropout_keys=batch.dropout_keys)  # (B, T, C)
        at = mask.int().argmax(dim=1, keepdim=True) + torch.arange(self.most_tokens, device=mask.device)
        inside = at < mask.size(1)
        at = at.clamp(max=mask.size(1) - 1)  # (B, R)
        targets = batch.targets.gather(1, at).where(inside, IGNORE_INDEX)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.size(-1)))  # (B, R, C)
        if self.config.temperature != 1:
            hidden = hidden / self.config.temperature
        losses = losses_of_targets(hidden.flatten(0, 1), model.head_weight, targets.flatten(), model.config.vocab_size)
        return -losses.view_as(targets), targets != IGNORE_INDEX

    def loss_sum(self, batch: Batch) -> Sums:
        """The summed loss of the batch's units, and further sums: `delta_logp` and `max_delta_logp`, how far the
        log-probabilities are from those that the engine drew with; `clipped`, tokens whose ratio is out of range;
        `entropy`, estimated by the drawn tokens; `kl`. Without gradients the plain cross-entropy."""
        if not torch.is_grad_enabled():
            return self.plain.loss_sum(batch)
        assert batch.advantages is not None
        assert batch.drawn is not None
        logps, drawn = self.logps(batch)
        change = torch.where(drawn, logps - batch.drawn, 0)
        ratio, better = change.exp(), batch.advantages[:, None].to(logps.dtype)
        low, high = 1 - self.config.clip_low, 1 + self.config.clip_high
        gain = torch.minimum(ratio * better, ratio.clamp(low, high) * better)
        clipped = torch.where(better > 0, ratio > high, ratio < low) & drawn & (better != 0)
        weights = self.token_weights(drawn, logps.dtype)
        loss = -gain
        lengths = drawn.sum(dim=1, keepdim=True).clamp(min=1)
        each = drawn.to(logps.dtype) if self.config.loss == "dapo" else drawn / lengths  # a mean over tokens, in units
        means = {"delta_logp": change.abs(), "clipped": clipped, "entropy": torch.where(drawn, -logps, 0)}
        if self.config.beta:
            assert batch.reference is not None
            gap = torch.where(drawn, batch.reference - logps, 0)
            kl = gap.exp() - gap - 1  # k3 of Schulman 2020, "Approximating KL divergence"
            loss, means["kl"] = loss + self.config.beta * kl, kl
        further = {name: (value.detach() * each).sum() for name, value in means.items()}
        further[f"{LARGEST}delta_logp"] = change.detach().abs().amax()
        return (loss * weights).sum(), further
