"""MODEL → LOSS: how well the next token of held-out text is predicted, per token and per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.errors import UsageError, UserError


class Validation(NamedTuple):
    """The result.

    Attributes:
        loss: mean of -ln p(target) over all valid targets, in nats a token.
        bpb: bits per UTF-8 byte of the targets, comparable between tokenizers; None where the bytes are unknown.
        tokens: valid targets.
        bytes: UTF-8 bytes that they stand for.
        stderr, bpb_stderr: standard errors of loss and bpb; None of a single batch.
    """

    loss: float
    bpb: float | None
    tokens: int
    bytes: int
    stderr: float | None = None
    bpb_stderr: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is beyond a float."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf  # ln of the largest float64: 709.78


@torch.no_grad()
def batch_losses(
    loss_sum: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray | None,
    device: torch.device,
) -> Tensor:
    """(batches, 3) float64 on the CPU: the sum of -ln p(target) over the valid targets of each batch, their number, and
    the UTF-8 bytes that they stand for (0 where the lengths of the tokens are unknown).

    Args:
        loss_sum: summed loss (scalar tensor, nats) of one batch on `device`, called without gradients.
        batches: on the CPU; each is copied to `device` here.
        byte_lengths: (V,) int64, `Tokenizer.byte_lengths()`.
    """
    lengths = None if byte_lengths is None else torch.as_tensor(byte_lengths)
    nats: list = []  # on a GPU left there: the loop does not wait for it
    counts: list[tuple[int, int]] = []
    for batch in batches:
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        counts.append((targets.numel(), 0 if lengths is None else int(lengths[targets].sum())))
        loss = loss_sum(batch.to(device)).detach()
        # On the CPU small tensors kept in a list would part the memory that logits reuse.
        nats.append(float(loss) if device.type == "cpu" else loss)
    # Summed on the CPU in float64, which MPS does not have.
    each = torch.zeros(len(nats), 3, dtype=torch.float64)
    if nats:
        each[:, 0] = torch.tensor(nats, dtype=torch.float64) if device.type == "cpu" else torch.stack(nats).cpu()
        each[:, 1:] = torch.tensor(counts, dtype=torch.float64)
    return each


def loss_sums(each: Tensor) -> Tensor:
    """(13,) of batches (batches, 3): their totals (3), the sum of the outer products of each with itself (9), for the
    standard error, and the number of batches with a valid target. To be added over processes."""
    return torch.cat([each.sum(dim=0), (each.T @ each).flatten(), (each[:, 1] > 0).sum().double()[None]])


def validation_of(sums: Tensor) -> Validation:
    """Turn the `loss_sums` of everything that was read into the result.

    Raises:
        UserError: there was no valid target.
    """
    nats, tokens, n_bytes = sums[:3].tolist()
    if not tokens:
        raise UserError("there is no token to evaluate on; give more validation text")
    bits = 1 / math.log(2)
    bpb_stderr = ratio_stderr(sums, 2)
    return Validation(
        nats / tokens,
        nats * bits / n_bytes if n_bytes else None,
        int(tokens),
        int(n_bytes),
        ratio_stderr(sums, 1),
        None if bpb_stderr is None else bpb_stderr * bits,
    )


def ratio_stderr(sums: Tensor, by: int) -> float | None:
    """Standard error of the nats' total over total `by`, batches taken as the sampled units (Cochran 1977, section
    2.11: the residuals of each batch's nats from the ratio). None of fewer than two batches, or where the total is 0.

    Neighbouring rows often are of one document: batches, not tokens, are nearly independent.
    """
    m, total, products = float(sums[12]), float(sums[by]), sums[3:12].view(3, 3)
    if m < 2 or not total:
        return None
    ratio = float(sums[0]) / total
    residuals = float(products[0, 0] - 2 * ratio * products[0, by] + ratio**2 * products[by, by])
    return math.sqrt(max(0.0, residuals) * m / (m - 1)) / total


def count_rows(split_tokens: int, seq_len: int, limit_tokens: int = 0) -> int:
    """Full rows of `seq_len` targets in the first `limit_tokens` of a split, 0 for all of it.

    A row reads one token more than it predicts, and what is left after the last full row (fewer than `seq_len`
    tokens) is not evaluated: ⌊(split_tokens - 1) / seq_len⌋ rows at most.

    Raises:
        UserError: not one row.
    """
    rows = (split_tokens - 1) // seq_len
    if rows < 1:
        raise UserError(
            f"the split has {split_tokens:,} tokens and one row needs {seq_len + 1:,}; "
            "prepare more validation text or choose a shorter sequence length"
        )
    if limit_tokens < seq_len and limit_tokens != 0:
        raise UsageError(
            f"val-tokens is {limit_tokens:,}, must be at least one row of {seq_len:,} tokens, or 0 for all"
        )
    return min(rows, limit_tokens // seq_len) if limit_tokens else rows


# ---- a model that knows only how often each token occurs: the loss that any language model must beat


def token_counts(chunks: Iterable[np.ndarray], n_vocab: int) -> np.ndarray:
    """(n_vocab,) int64: occurrences of each token id in `chunks`."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for chunk in chunks:
        counts += np.bincount(chunk, minlength=n_vocab)
    return counts


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Mean -ln p of the held-out tokens, in nats; p from the training counts plus one each (Laplace smoothing).

    Both are (n_vocab,) counts.
    """
    log_p = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(held_out * log_p).sum() / held_out.sum())
