"""MODEL → LOSS: how well the next token of held-out text is predicted, per token and per byte."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.errors import UsageError, UserError


class LossSums(NamedTuple):
    """What is added up over batches and over processes, each a float64 scalar on the CPU.

    `LossSums(*total)` restores them from `torch.stack(sums)` summed over all ranks.

    Attributes:
        nats: sum of -ln p(target) over the valid targets.
        tokens: number of valid targets.
        bytes: UTF-8 bytes of the valid targets; 0 where the lengths of the tokens are unknown.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor


class Validation(NamedTuple):
    """The result.

    Attributes:
        loss: mean of -ln p(target) over all valid targets, in nats a token.
        bpb: bits per UTF-8 byte of the targets, comparable between tokenizers; None where the bytes are unknown.
        tokens: valid targets.
        bytes: UTF-8 bytes that they stand for.
    """

    loss: float
    bpb: float | None
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is beyond a float."""
        return math.exp(self.loss) if not self.loss > 709 else math.inf  # ln of the largest float64: 709.78


def validate(
    loss_sum: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray | None,
    device: torch.device,
) -> Validation:
    """Evaluate on one process: `finish(sum_losses(...))`."""
    return finish(sum_losses(loss_sum, batches, byte_lengths, device))


@torch.no_grad()
def sum_losses(
    loss_sum: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray | None,
    device: torch.device,
) -> LossSums:
    """Sums over `batches`, independent of how the rows are split into them, beyond rounding.

    Args:
        loss_sum: summed loss (scalar tensor, nats) of one batch on `device`, called without gradients.
        batches: on the CPU; each is copied to `device` here.
        byte_lengths: (V,) int64, `Tokenizer.byte_lengths()`.
    """
    lengths = None if byte_lengths is None else torch.as_tensor(byte_lengths)
    total = torch.zeros((), dtype=torch.float64)
    waiting: list[Tensor] = []  # left on the device: the loop does not wait for it
    tokens = n_bytes = 0
    for batch in batches:
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        tokens += targets.numel()
        n_bytes += 0 if lengths is None else int(lengths[targets].sum())
        loss = loss_sum(batch.to(device)).detach()
        if device.type == "cpu":  # small tensors kept in a list would part the memory that logits reuse
            total += loss
        else:
            waiting.append(loss)
    if waiting:  # summed on the CPU in float64, which MPS does not have
        total += torch.stack(waiting).cpu().double().sum()
    return LossSums(total, *(torch.tensor(float(x), dtype=torch.float64) for x in (tokens, n_bytes)))


def finish(sums: LossSums) -> Validation:
    """Turn sums over everything that was read into the result.

    Raises:
        UserError: there was no valid target.
    """
    nats, tokens, n_bytes = float(sums.nats), int(sums.tokens), int(sums.bytes)
    if not tokens:
        raise UserError("there is no token to evaluate on; give more validation text")
    bpb = nats / math.log(2) / n_bytes if n_bytes else None
    return Validation(nats / tokens, bpb, tokens, n_bytes)


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


def split_rows(n_rows: int, batch_rows: int) -> Sequence[range]:
    """The rows of each batch: 0 … n_rows - 1 in order, `batch_rows` at a time, the last batch shorter."""
    if batch_rows < 1:
        raise UsageError(f"batch-rows is {batch_rows}, must be at least 1")
    return [range(first, min(first + batch_rows, n_rows)) for first in range(0, n_rows, batch_rows)]
