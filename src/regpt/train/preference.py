"""Preferences: which of two answers is better. DPO, IPO, ORPO, SimPO and models of rewards are one objective."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.model.head import losses_of_targets
from regpt.model.transformer import Transformer
from regpt.train.config import PreferenceConfig
from regpt.train.objective import NextToken, Sums


class Answers(NamedTuple):
    """Of P pairs, the chosen answer first.

    Attributes:
        logps: (P, 2), sums of log-probabilities of the scored tokens; of a model of rewards these.
        lengths: (P, 2) int64, their number.
        nll: (P,), mean loss of the chosen answer's targets, those of the format too.
    """

    logps: Tensor
    lengths: Tensor
    nll: Tensor


class Preference:
    """The loss is the mean over pairs. Log-probabilities are sums over an answer, never means, but where the method is
    defined by means (IPO, ORPO, SimPO).

    Args:
        model: computes the hidden states.
        config: method and coefficients.
    """

    def __init__(self, model: Transformer, config: PreferenceConfig):
        self.model, self.config, self.plain = model, config, NextToken(model)

    def units(self, batches: Sequence[Batch]) -> int:
        """Count the pairs."""
        return sum(int(np.count_nonzero(pairs_of(batch).numpy()[:, 0] >= 0)) for batch in batches)

    def answers(self, batch: Batch) -> Answers:
        """What the model makes of both answers of each pair. A pair is one of its documents masked from the other."""
        assert batch.cu_seqlens is not None
        assert batch.scored is not None
        model, targets = self.model, batch.targets.flatten()
        hidden = model.hidden(
            batch.idx, positions=batch.positions, cu_seqlens=batch.cu_seqlens, dropout_keys=batch.dropout_keys
        )
        at = torch.arange(len(targets), device=targets.device)
        document = pairs_of(batch).clamp(min=0)
        begin, end = batch.cu_seqlens[document], batch.cu_seqlens[document + 1]  # (P, 2)
        inside = (at >= begin[..., None]) & (at < end[..., None])  # (P, 2, B·T)
        if self.config.method == "reward":
            last = torch.where(inside & (targets != IGNORE_INDEX), at + 1, 0).amax(dim=-1)  # the end of the last answer
            rewards = model.rewards(hidden.flatten(0, 1)[last])
            return Answers(rewards, inside.sum(dim=-1), torch.zeros_like(rewards[:, 0]))
        losses = losses_of_targets(hidden.flatten(0, 1), model.head_weight, targets, model.config.vocab_size)  # (B·T,)
        counted = batch.targets if self.config.format_tokens else batch.scored
        scored = inside & (counted.flatten() != IGNORE_INDEX)
        trained = inside[:, 0] & (targets != IGNORE_INDEX)
        nll = torch.where(trained, losses, 0).sum(dim=-1) / trained.sum(dim=-1).clamp(min=1)
        return Answers(torch.where(scored, -losses, 0).sum(dim=-1), scored.sum(dim=-1), nll)

    def scores(self, answers: Answers, batch: Batch) -> Tensor:
        """(P, 2): what the method compares. Log-probabilities relative to the reference (DPO), a token (IPO); those of
        the model alone, a token (SimPO), as odds (ORPO); rewards."""
        assert batch.reference is not None
        if self.config.method == "reward":
            return answers.logps
        if self.config.method == "dpo":
            return answers.logps - batch.reference.to(answers.logps.dtype)
        gains = answers.logps - batch.reference.to(answers.logps.dtype) * (self.config.method == "ipo")
        means = gains / answers.lengths.clamp(min=1)
        return means - torch.log1p(-means.exp().clamp(max=1 - 1e-6)) if self.config.method == "orpo" else means

    def loss_sum(self, batch: Batch) -> Sums:
        """The summed loss of the batch's pairs, and further sums: `chosen` and `rejected` (log-probabilities of the
        answers, or rewards), `margin` (of the chosen answer's score over that of the rejected one), `ranked` (pairs
        whose margin is above 0), `nll`. Without gradients, for validation, the plain cross-entropy of both answers."""
        if not torch.is_grad_enabled():
            return self.plain.loss_sum(batch)
        answers = self.answers(batch)
        real, scores = pairs_of(batch)[:, 0] >= 0, self.scores(answers, batch)
        margin = scores[:, 0] - scores[:, 1]
        method, beta, weight = self.config.method, self.config.beta, self.config.nll
        logps, _, nll = answers
        if method == "dpo":
            loss = -F.logsigmoid(beta * margin)
        elif method == "reward":  # without a margin that is to be kept (Llama Team 2024, section 4.1.2)
            loss, weight = -F.logsigmoid(margin), 0.0
        elif method == "ipo":
            loss = (margin - 1 / (2 * beta)) ** 2
        elif method == "simpo":
            loss = -F.logsigmoid(beta * margin - self.config.gamma)
        else:  # ORPO: its weight is beta, that of the negative log-likelihood is one
            loss, weight = -beta * F.logsigmoid(margin), 1.0
        if weight:
            loss = loss + weight * nll

        def total(values: Tensor) -> Tensor:
            return torch.where(real, values, 0).sum()

        further = {"chosen": logps[:, 0], "rejected": logps[:, 1], "margin": margin, "nll": nll}
        further["ranked"] = (margin > 0).to(logps.dtype)
        return total(loss), {name: total(values.detach()) for name, values in further.items()}


def pairs_of(batch: Batch) -> Tensor:
    assert batch.pairs is not None
    return batch.pairs
