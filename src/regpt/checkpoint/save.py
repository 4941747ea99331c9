"""Write a checkpoint, whole or not at all, and delete the ones that are no longer wanted."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from regpt.checkpoint.files import discard, remove_leftovers, whole_folder, write_json, write_tensors, write_text
from regpt.checkpoint.load import checkpoints, step_of
from regpt.checkpoint.manifest import (
    FORMAT_VERSION,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    check_sizes,
    write_manifest,
)
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.model.weights import state_tensors
from regpt.text.tokenizer import Tokenizer


def save_checkpoint(
    folder: Path,
    *,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Everything that a run needs to go on, and a reader needs to sample, in `folder`; returns it.

    Nothing is seen under the name `folder` before all of it is on the disk. One process at a time may save into the
    folder's parent: what it finds there half-written, a crash has left, and it is deleted.

    Args:
        folder: `RUN/checkpoints/step-00000250`, see `checkpoint_folder`.
        model: its weights are stored at the real vocabulary size, the tied head once.
        tokenizer: stored beside the weights.
        optimizer: tensors named `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`, without padding rows.
        state: JSON values; `step` is the number of updates done.

    Raises:
        UserError: the disk is full, or the place cannot be written to; earlier checkpoints are untouched.
    """
    remove_leftovers(folder.parent, "step-*")
    with whole_folder(folder) as temporary:
        write_json(temporary / MODEL, {"format_version": FORMAT_VERSION, **asdict(model.config)})
        write_text(temporary / TOKENIZER, tokenizer.to_json())
        write_tensors(temporary / WEIGHTS, state_tensors(model))
        write_tensors(temporary / OPTIMIZER, optimizer)
        write_json(temporary / STATE, state)
        write_manifest(temporary)
    return folder


def prune_checkpoints(run: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete the older checkpoints of `run`; returns those deleted.

    The newest `keep_last` stay (0: all stay), and those at multiples of `keep_every` (0: none). A damaged one is
    neither counted nor deleted: it may be the only trace of something.
    """
    intact = [folder for folder in checkpoints(run) if is_intact(folder)]
    old = intact[:-keep_last] if keep_last else []
    unwanted = [folder for folder in old if not (keep_every and step_of(folder) % keep_every == 0)]
    for folder in unwanted:
        discard(folder)
    return unwanted


def is_intact(folder: Path) -> bool:
    """Whether the files of `folder` have the sizes of its manifest."""
    try:
        check_sizes(folder)
    except UserError:
        return False
    return True
