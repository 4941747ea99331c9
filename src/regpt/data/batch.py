"""The one thing that every training method feeds to the model."""

from typing import NamedTuple

import torch
from torch import Tensor

from regpt.model.ops import IGNORE_INDEX as IGNORE_INDEX  # a target that carries no loss


class Batch(NamedTuple):
    """One micro-batch of B rows of T tokens, all int64.

    `targets` (B, T) holds the token after each of `idx` (B, T), or `IGNORE_INDEX`. `positions` (B, T) restart at
    document starts when attention is masked by document, and `cu_seqlens` (documents + 1 or more,) are then the
    cumulative document lengths over the flattened B·T tokens, from 0 to B·T, which may be repeated at the end
    (documents of no tokens); both are None when a row is read as one text. `dropout_keys` (B,), from 0 to 2³² - 1, make
    the masks of dropout (`model.dropout`); None is no dropout, as in all but training.

    Of preferences: `pairs` (P, 2), the documents of chosen and rejected answers by their place in `cu_seqlens`, -1
    where there are fewer pairs than P; `scored` (B, T), the targets whose log-probability counts as that of the answer;
    `reference` (P, 2) float32, the log-probabilities of both answers under the reference model.

    Of replies that the model wrote, one a row, whose tokens are the targets: `advantages` (B,) float32; `drawn` (B, R)
    float32, the log-probabilities with which a reply's up to R tokens were drawn; `reference` (B, R) float32, those
    under the reference model.
    """

    idx: Tensor
    targets: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_keys: Tensor | None = None
    pairs: Tensor | None = None
    scored: Tensor | None = None
    reference: Tensor | None = None
    advantages: Tensor | None = None
    drawn: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory does not wait."""
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]
