"""HIDDEN STATES → LOG-PROBABILITIES of given tokens, without keeping logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.model.transformer import Transformer

PIECE = 32  # rows of logits, 6 MB for GPT-2's vocabulary: they stay in a processor's cache between the passes over them


def log_probability(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Natural log of the probability of `targets` (N,) under `logits` (N, V), in float32 (float64 for float64), and
    whether each is the likeliest token (the first of equals). In the form that compiles into one pass."""
    likeliest = logits.argmax(dim=-1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=-1), likeliest == targets


class CpuHead:
    """The same for a processor: one buffer for the logits (fresh memory of that size costs as much as a pass over it),
    read in pieces. Without gradients only."""

    def __init__(self, model: Transformer, rows: int):
        self.model, self.rows = model, rows
        self.buffer = torch.empty(0)

    def __call__(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(self.logits(hidden).split(PIECE), targets.split(PIECE))
        log_p, hit = zip(*(in_cache(logits, of) for logits, of in pieces))
        return torch.cat(log_p), torch.cat(hit)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V), valid until the next call."""
        if torch.is_autocast_enabled("cpu"):
            return self.model.logits(hidden)
        weight = self.model.head_weight
        if self.buffer.dtype != weight.dtype or len(self.buffer) < len(hidden):
            self.buffer = torch.empty(max(self.rows, len(hidden)), len(weight), dtype=weight.dtype)
        padded = torch.mm(hidden, weight.t(), out=self.buffer[: len(hidden)])
        return padded[:, : self.model.config.vocab_size]


def in_cache(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    hit = logits.gather(1, targets[:, None])[:, 0] >= logits.amax(dim=-1)  # six times as fast as argmax
    rows = hit.nonzero()[:, 0]
    hit[rows] = logits[rows].argmax(dim=-1) == targets[rows]  # of equals the first
    return -F.cross_entropy(logits, targets, reduction="none"), hit
