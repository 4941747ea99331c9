"""Diagnosis of the batch of a step: ranks, documents and weights that make its loss not finite."""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.documents import row_pieces
from regpt.data.loader import Loader
from regpt.text.tokenizer import Tokenizer
from regpt.train.precision import autocast
from regpt.train.trainer import Row, Trainer, json_number

SHOWN, TEXT_CHARACTERS = 8, 80  # documents in an event, and how much of each


def examine(trainer: Trainer, loader: Loader, tokenizer: Tokenizer) -> Row:
    """Facts about the batch of the present step, the same in every process, all of which call it.

    Every process computes its part once more, so `ranks` are those where it is not finite again. Then all compute the
    step once more, as it was: `repeats` is whether its loss or norm is not finite again, which a fault of the moment is
    not. The gradients are those of the step afterwards: an update may follow.
    """
    own = {"rank": trainer.mesh.rank, "finite": own_part_is_finite(trainer), "documents": []}
    own["documents"] = [*document_losses(trainer, loader, tokenizer)]
    loss, norm, _ = trainer.gradients()
    repeats = not (math.isfinite(loss) and math.isfinite(norm))
    every = [json.loads(part) for part in trainer.mesh.gather(json.dumps(own).encode())]
    documents = worst_first([document for part in every for document in part["documents"]])
    ranks = [part["rank"] for part in every if not part["finite"]]
    rows = loader.first_row + trainer.data_step * loader.batch_rows
    facts: Row = {"ranks": ranks, "repeats": repeats, "weights": first_spoiled_weight(trainer)}
    facts |= {"rows": [rows, rows + loader.batch_rows - 1], "n_documents": len(documents)}
    return facts | {"documents": documents[:SHOWN], "where": where(ranks, documents, repeats)}


def own_part_is_finite(trainer: Trainer) -> bool:
    """Whether this process's own loss, gradients and their norm are finite, computed once more, not summed with the
    others'."""
    own = trainer.objective.units(trainer.loader.step(trainer.data_step, trainer.micro_batch.rows))
    dtype = trainer.backend.parameters[0].dtype
    divisor = torch.tensor(max(own * trainer.mesh.world_size, 1), dtype=dtype, device=trainer.mesh.device)
    divisor /= trainer.loss_scale.scale

    def own_total(rows: int) -> Tensor:
        return trainer.backend.forward_backward(trainer.loader.step(trainer.data_step, rows), divisor)[0]

    total = trainer.micro_batch.attempt(own_total)
    gradients = [p.grad for p in trainer.backend.parameters if p.grad is not None]
    return bool(total.isfinite()) and bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def document_losses(trainer: Trainer, loader: Loader, tokenizer: Tokenizer) -> Iterable[dict[str, Any]]:
    """The documents of this process's rows, each with the mean loss of its tokens there (None: none is predicted)."""
    for row, batch in zip(loader.step_rows(trainer.data_step), loader.step(trainer.data_step, 1)):
        carried = (batch.targets[0] != IGNORE_INDEX).tolist()
        losses = [x if valid else None for x, valid in zip(token_losses(trainer, batch).tolist(), carried)]
        for piece in row_pieces(loader.rows, row):
            # Target t is token t + 1 of the row.
            own = [x for x in losses[max(piece.place - 1, 0) : piece.place - 1 + len(piece.tokens)] if x is not None]
            text = tokenizer.decode([int(token) for token in piece.tokens])
            yield {
                "document": piece.document,
                "folder": piece.folder,
                "row": row,
                "place": piece.place,
                "offset": piece.offset,
                "tokens": len(piece.tokens),
                "loss": json_number(sum(own) / len(own)) if own else None,
                "text": shortened(text),
            }


@torch.no_grad()
def token_losses(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """The loss of each target of a batch of one row, (T,) float64 on the CPU, by the uncompiled model, no dropout."""
    idx, targets, positions, cu_seqlens = batch.to(trainer.mesh.device)[:4]
    model = trainer.model
    with autocast(trainer.config.autocast_precision, trainer.mesh.device):
        logits = model(idx, positions=positions, cu_seqlens=cu_seqlens)[0, :, : model.config.vocab_size]  # (T, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets[0], ignore_index=IGNORE_INDEX, reduction="none").double().cpu()


def worst_first(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses that are not finite, then from the largest to the smallest; equals as they lie in the data."""

    def badness(document: dict[str, Any]) -> float:
        loss = document["loss"]
        return -math.inf if loss is None else math.inf if isinstance(loss, str) else loss

    return sorted(documents, key=lambda d: (-badness(d), d["row"]))


def first_spoiled_weight(trainer: Trainer) -> str | None:
    """The first parameter that is not finite, of the model itself."""
    return next((name for name, p in trainer.model.named_parameters() if not p.isfinite().all()), None)


def where(ranks: list[int], documents: list[dict[str, Any]], repeats: bool) -> str:
    """For the end of a sentence: ` (rank 1; document 17, row 40: 'ba do…')`."""
    once_more = "again when computed once more" if repeats else "not so when computed once more"
    parts = [f"rank {', '.join(map(str, ranks))}" if ranks else once_more]
    bad = [document for document in documents if isinstance(document["loss"], str)]
    if bad:
        parts.append(f"document {bad[0]['document']}, row {bad[0]['row']}: {bad[0]['text']!r}")
    return f" ({'; '.join(parts)})"


def shortened(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 1] + "…"
