"""What lies among the checkpoints of a run, and everything that is wrong with it; nothing is changed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from regpt.checkpoint.best import METRICS, best_step, validation_losses
from regpt.checkpoint.load import CHECKPOINTS, STEP_FOLDER, damages, refuse_other_step, step_of
from regpt.checkpoint.manifest import AVERAGE, STATE, DamagedFile, check_sizes
from regpt.errors import UserError
from regpt.files import is_folder, stat_or_none, unless_gone

SET_ASIDE, UNFINISHED = ".damaged-", ".tmp-"  # in the names that `save.set_aside` and `files.temporary_name` give


@dataclass(frozen=True)
class Listed:
    """A folder among the checkpoints of a run.

    Attributes:
        name: of the folder.
        step: updates made, by the folder's name; None for what is no checkpoint (any more, or yet).
        kind: a checkpoint; a damaged one that was set aside; one that is being written, or that a crash has left.
        bytes: of all its files.
        written: Unix seconds, of the file that was written last.
        average: whether a moving average of the weights is stored.
        problem: why it is not complete, by names, sizes and the step in its state; "" when it is.
    """

    name: str
    step: int | None
    kind: Literal["checkpoint", "set aside", "unfinished"]
    bytes: int
    written: float
    average: bool
    problem: str
    loss: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file of a checkpoint."""

    file: str
    what: str


def list_checkpoints(run: Path) -> list[Listed]:
    """Everything among the checkpoints of `run`, by step and name; the tensors are not read. What a live run deletes
    meanwhile is left out."""
    within = (run / CHECKPOINTS).glob("*") if is_folder(run) else ()
    folders = [path for path in within if path.is_dir() and not path.is_symlink()]
    listed = [unless_gone(folder, partial(described, folder), lambda one: one.problem) for folder in folders]
    losses = validation_losses(run / METRICS)
    found = [replace(one, loss=losses.get(one.step)) if one.step is not None else one for one in listed if one]
    chosen = best_step(losses, [one.step for one in found if one.step is not None and not one.problem])
    found = [replace(one, best=one.step is not None and one.step == chosen) for one in found]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def described(folder: Path) -> Listed:
    files = [found for path in folder.iterdir() if (found := stat_or_none(path))]
    known = bool(STEP_FOLDER.fullmatch(folder.name))
    problem, average = "", False
    try:
        average = bool(check_sizes(folder).tensor_files(AVERAGE))
        refuse_other_step(folder / STATE, folder.name)
    except UserError as error:
        problem = f"{error.name} {error.what}" if isinstance(error, DamagedFile) else str(error)
    return Listed(
        name=folder.name,
        step=step_of(folder) if known else None,
        kind="checkpoint" if known else "set aside" if SET_ASIDE in folder.name else "unfinished",
        bytes=sum(file.st_size for file in files),
        written=max((file.st_mtime for file in files), default=folder.stat().st_mtime),
        average=average,
        problem=problem,
    )


def find_damages(
    folders: Iterable[Path], look: Callable[[Path, str], None] = lambda folder, file: None
) -> dict[Path, list[Damage]]:
    """`find_damage` of each of `folders`; those that a live run deletes or replaces meanwhile are left out."""
    found = {}
    for folder in folders:
        damage = unless_gone(folder, partial(find_damage, folder, partial(look, folder)), bool)
        found |= {} if damage is None else {folder: damage}
    return found


def find_damage(folder: Path, look: Callable[[str], None] = lambda file: None) -> list[Damage]:
    """Every file of the checkpoint `folder` that is not as it should be; empty for a checkpoint that a run can take;
    `look` as in `damages`."""
    found = damages(folder, look=look)
    named = [(e.name, e.what) if isinstance(e, DamagedFile) else (name, str(e)) for name, e in found]
    return [Damage(*one) for one in sorted(named)]
