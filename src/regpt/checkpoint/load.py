"""Find checkpoints and read them, after their files have been checked."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from regpt.checkpoint.files import TensorFiles, read_json
from regpt.checkpoint.manifest import (
    FORMAT_VERSION,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    damaged,
    verify_checkpoint,
)
from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked; its tensors are read from the disk when they are asked for.

    Attributes:
        folder: where it lies.
        config: shape of the model.
        state: what the run stored; `step` is the number of updates done.
    """

    folder: Path
    config: ModelConfig
    state: dict[str, Any]

    @property
    def step(self) -> int | None:
        return self.state.get("step")

    def weights(self) -> TensorFiles:
        """Name → weight at its real shape, for `load_weights`."""
        return TensorFiles([self.folder / WEIGHTS])

    def optimizer(self) -> TensorFiles:
        """`exp_avg/<parameter>`, `exp_avg_sq/<parameter>` → tensor, without padding rows."""
        return TensorFiles([self.folder / OPTIMIZER])

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.folder / TOKENIZER)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where `run` keeps its checkpoint after `step` updates."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of `run`, the oldest step first, whether intact or not."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(
        (f for f in folders if STEP_FOLDER.fullmatch(f.name) and f.is_dir() and not f.is_symlink()), key=step_of
    )


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def newest_checkpoint(run: Path, *, optimizer: bool = True, warn: Callable[[str], None] = print_warning) -> Path:
    """The newest checkpoint of `run` that passes `verify_checkpoint`; `warn` is told of damaged ones, which are kept.

    Raises:
        UserError: there is none.
    """
    folders = checkpoints(run)
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder, optimizer=optimizer)
        except UserError as error:
            warn(f"skipped {folder.name}: {error}")
        else:
            return folder
    what = f"none of its {len(folders)} checkpoints is intact" if folders else "it has no checkpoint"
    raise UserError(
        f"run {str(run)!r} cannot be opened, {what}; start it again with another --out, or choose another run"
    )


def load_checkpoint(folder: Path, *, optimizer: bool = True, verified: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, after `verify_checkpoint` (`optimizer` as there) unless the caller has just done it.

    Raises:
        UserError: a file is missing, changed or damaged, or was written by a regpt with another format.
    """
    if not verified:
        verify_checkpoint(folder, optimizer=optimizer)
    return Checkpoint(folder, read_config(folder / MODEL), read_json(folder / STATE))


def read_config(path: Path) -> ModelConfig:
    """The model's shape from `model.json`."""
    content = read_json(path)
    if content.pop("format_version", None) != FORMAT_VERSION:
        raise damaged(path, f"does not have format version {FORMAT_VERSION}")
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the model"
        raise damaged(path, f"describes no model ({where}: {first['msg']})") from None
