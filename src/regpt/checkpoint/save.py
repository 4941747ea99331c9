"""Write a checkpoint, whole or not at all."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from regpt.checkpoint.base import AdapterRecord
from regpt.checkpoint.load import verify_checkpoint
from regpt.checkpoint.manifest import (
    ADAPTER,
    AVERAGE,
    FORMAT_VERSION,
    IMPORTED,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    write_manifest,
)
from regpt.checkpoint.state import RunState, write_state
from regpt.errors import UserError
from regpt.files import SUCCESSOR, promote, remove_temporary, unused, whole_folder, write_json, write_text
from regpt.model.config import ModelConfig
from regpt.tensors import write_divided
from regpt.text.tokenizer import Tokenizer

MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: everything that a run needs to go on, and a reader needs to sample.

    Attributes:
        config: shape of the model.
        tokenizer: stored next to the weights.
        weights: all of them, learning or not, at the real vocabulary size, the tied head once; or the adapters alone.
        optimizer: tensors named `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`, without padding rows.
        average: exponential moving average of the weights, named and shaped like them; empty when none is kept.
        state: the rest.
        companions: chat template and options of generation of the model that the run began with, by file name.
        adapter: of weights that are adapters.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: RunState
    average: Mapping[str, Tensor] | None = None
    companions: Mapping[str, str] = field(default_factory=dict)
    adapter: AdapterRecord | None = None

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The mappings of tensors by the names of their fields."""
        found = {"weights": self.weights, "optimizer": self.optimizer, "average": self.average}
        return {name: tensors for name, tensors in found.items() if tensors is not None}


def save_checkpoint(folder: Path, contents: Contents, max_file_bytes: int = MAX_FILE_BYTES) -> Path:
    """Write `contents` as the checkpoint `folder`; returns it.

    Nothing is seen under the name `folder` before all of it is on the disk. One process at a time may save into the
    folder's parent: what it finds there half-written, a crash has left, and it is deleted. A damaged checkpoint of the
    same name is set aside (`step-00000250.damaged-1`), never deleted.

    Args:
        folder: `RUN/checkpoints/step-00000250`, see `checkpoint_folder`.
        max_file_bytes: tensors beyond it go into several files with an index.

    Raises:
        UserError: the disk is full, or the place cannot be written to; earlier checkpoints are untouched.
    """
    finish_replacements(folder.parent)
    with whole_folder(folder) as temporary:
        write_json(temporary / MODEL, {"format_version": FORMAT_VERSION, **contents.config.stored()})
        write_text(temporary / TOKENIZER, contents.tokenizer.to_json())
        write_divided(temporary, WEIGHTS, contents.weights, max_file_bytes)
        write_divided(temporary, OPTIMIZER, contents.optimizer, max_file_bytes)
        if contents.average is not None:
            write_divided(temporary, AVERAGE, contents.average, max_file_bytes)
        if contents.companions:
            write_json(temporary / IMPORTED, dict(contents.companions))
        if contents.adapter is not None:
            contents.adapter.write(temporary / ADAPTER)
        write_state(temporary / STATE, contents.state)
        write_manifest(temporary)
        if folder.exists() and not is_intact(folder):
            set_aside(folder)
    return folder


def finish_replacements(parent: Path) -> None:
    """Let the folders that a crash left waiting take their names, then delete what it left half-written."""
    for waiting in parent.glob(f"step-*{SUCCESSOR}"):
        if not is_intact(waiting):
            set_aside(waiting)
            continue
        folder = waiting.with_name(waiting.name.removesuffix(SUCCESSOR))
        if folder.exists() and not is_intact(folder):
            set_aside(folder)
        promote(waiting)
    remove_temporary(parent, "step-*")


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer looked at."""
    return folder.replace(unused(folder, ".damaged-{}"))


def is_intact(folder: Path) -> bool:
    """Whether `verify_checkpoint` finds nothing wrong with `folder`."""
    try:
        verify_checkpoint(folder)
    except UserError:
        return False
    return True


def kept_steps(
    steps: Iterable[int],
    keep_last: int,
    keep_every: int,
    best: Callable[[Iterable[int]], int | None] = lambda steps: None,
) -> set[int]:
    """Those of `steps` whose checkpoints stay: the newest `keep_last` (0: all), those at multiples of `keep_every` (0:
    none), and the `best`."""
    steps = sorted(set(steps))
    return {*steps[-keep_last:], best(steps)} & {*steps} | {s for s in steps if keep_every and s % keep_every == 0}
