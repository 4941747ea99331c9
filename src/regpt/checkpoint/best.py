"""The checkpoint of a run with the lowest validation loss: by the rows of its metrics, of those that are there."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from regpt.checkpoint.load import CHECKPOINTS, STEP_FOLDER, checkpoints, step_of
from regpt.errors import UsageError, UserError
from regpt.files import address_of, is_file
from regpt.structured import json_lines

METRICS = "metrics.jsonl"
BEST = "best"  # RUN/checkpoints/best means the best of the run's checkpoints; no folder has that name
STEPS_BACK = ("resume", "rewind")  # events after which rows of later steps do not count


def validation_losses(path: Path) -> dict[int, float]:
    """Step → loss over the whole validation, from a run's metrics.jsonl; empty where there is no file.

    What a step back undid does not count, nor what is not finite.
    """
    kinds = (b'"val"', b'"event"') if is_file(path) else ()
    rows = {number: row for kind in kinds for number, row, _ in json_lines(path, kind) if row is not None}
    losses: dict[int, float] = {}
    for _, row in sorted(rows.items(), key=lambda item: item[0]):
        step, loss = row.get("step"), row.get("loss")
        if type(step) is not int:
            continue
        if row.get("kind") == "event" and row.get("name") in STEPS_BACK:
            losses = {made: known for made, known in losses.items() if made <= step}
        elif row.get("kind") == "val" and "source" not in row and isinstance(loss, float) and math.isfinite(loss):
            losses[step] = loss
    return losses


def best_step(losses: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """The one of `steps` with the lowest loss, the earliest of equals; None when the loss of none is known."""
    return min((step for step in steps if step in losses), key=lambda step: (losses[step], step), default=None)


def by_loss(names: Iterable[str], losses: Mapping[int, float]) -> list[str]:
    """The names of checkpoints whose validation loss is known, the lowest first, the earliest of equals."""
    steps = {name: step_of(Path(name)) for name in names}
    return sorted((name for name in steps if steps[name] in losses), key=lambda name: (losses[steps[name]], name))


def best_last(run: Path) -> list[Path]:
    """The checkpoint folders of `run` whose validation loss is known, the best one last."""
    names = by_loss((folder.name for folder in checkpoints(run)), validation_losses(run / METRICS))
    if not names:
        raise UserError(
            f"run {str(run)!r} has no checkpoint whose validation loss is known; leave out {BEST!r}, or train with "
            "checkpoint.keep_best"
        )
    return [run / CHECKPOINTS / name for name in reversed(names)]


def named_checkpoint(name: str) -> Path:
    """The checkpoint folder that `name` means: RUN/checkpoints/best is that of the run's lowest validation loss."""
    path = Path(name)
    return best_last(path.parents[1])[-1] if (path.parent.name, path.name) == (CHECKPOINTS, BEST) else path


def at_step(model: str, step: str) -> str:
    """The MODEL that is the run `model` at `step`: a number, `best`, or "" for what `model` means without one.

    Raises:
        UsageError: another word, or a model that is a checkpoint already.
    """
    if not step:
        return model
    if step != BEST and not (step.isascii() and step.isdigit()):
        raise UsageError(f"--step is {step!r}, must be the number of a checkpoint's step or {BEST}")
    name, chosen = model.rstrip("/"), step if step == BEST else f"step-{int(step):08d}"
    if STEP_FOLDER.fullmatch(Path(name).name):
        raise UsageError(f"--step chooses a checkpoint of a run and {model!r} is one; leave it out, or give the run")
    if step != BEST and not address_of(name):
        there = [folder.name for folder in checkpoints(Path(name))]
        if not there:
            raise UsageError(f"--step chooses a checkpoint and {model!r} has none; leave it out, or give a run")
        if chosen not in there:
            known = ", ".join(str(step_of(Path(folder))) for folder in there)
            raise UsageError(f"run {model!r} has no checkpoint of step {int(step)}; choose from {known} or {BEST}")
    return f"{name}/{CHECKPOINTS}/{chosen}"
