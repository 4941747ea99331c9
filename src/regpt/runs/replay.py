"""One step of a run once more, from the checkpoint before it."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regpt.checkpoint.load import Checkpoint, checkpoints, load_checkpoint, print_warning, step_of
from regpt.checkpoint.manifest import STATE
from regpt.checkpoint.state import read_state
from regpt.config import RunConfig, validate
from regpt.data.batch import Batch
from regpt.data.loader import Loader
from regpt.errors import UsageError, UserError
from regpt.files import unless_gone
from regpt.model.loss import loss_sum
from regpt.report.read import current, read_rows, steps_back
from regpt.runs.begin import Machine, assemble, open_parts, refuse_changed_data, run_mesh, start_again, start_at
from regpt.runs.examine import document_losses, first_spoiled_weight, worst_first
from regpt.runs.folder import read_run_config
from regpt.structured import read_object
from regpt.tensors import REMEDY
from regpt.train.precision import autocast
from regpt.train.trainer import Trainer, written


def replay(run: Path, step: int, *, op_level: bool = False) -> dict[str, Any]:
    """What update `step` of `run` is made with: loss, norm, documents; nothing in the run's folder changes.

    The updates between the checkpoint and it are made again. In as many processes as the run had, with
    `train.deterministic`, or on one machine with the same kernels, the numbers are those of the run, bitwise.

    Args:
        step: counted from 1, as in metrics.jsonl.
        op_level: also look for the first module whose output is not finite.

    Raises:
        UsageError: a step that the run does not have.
        UserError: no run, changed shards, or an update on the way that cannot be made.
    """
    config = config_of(run, step)
    if not 1 <= step <= config.train.steps:
        raise UsageError(f"--step is {step}, must be from 1 to the {config.train.steps} of the run")
    with run_mesh(config) as mesh, ExitStack() as stack:
        parts = open_parts(config, mesh)
        before = checkpoint_before(run, step)
        if before is None:
            start = start_again(parts, run, read_object(run / "env.json", REMEDY), {})
        else:
            refuse_changed_data(before, parts.corpus)
            start = start_at(parts, before, {})
        machine = assemble(stack, parts, start)
        trainer = machine.trainer
        if trainer.step >= step:
            raise UsageError(f"run {str(run)!r} began at step {trainer.step}; give a later --step")
        while trainer.step < step - 1:
            trainer.update()
        facts = {"run": str(run), "step": step, "from_step": start.step, "world_size": mesh.world_size}
        return facts | measured(machine) | {"recorded": recorded(run, step)} | (spoiling(machine) if op_level else {})


def config_of(run: Path, step: int) -> RunConfig:
    """The configuration that update `step` was made with: the next checkpoint's, or config.toml."""
    for folder in checkpoints(run):
        values = {}
        with suppress(UserError):  # a damaged one, or one that a live run has just deleted
            values = read_state(folder / STATE).config if step_of(folder) >= step else {}
        if values:
            return validate(values, str(folder / STATE))
    return read_run_config(run)


def checkpoint_before(run: Path, step: int) -> Checkpoint | None:
    """The newest valid checkpoint of fewer than `step` updates."""
    for folder in reversed([folder for folder in checkpoints(run) if step_of(folder) < step]):
        try:
            if found := unless_gone(folder, partial(load_checkpoint, folder)):
                return found
        except UserError as error:
            print_warning(f"skipped {folder.name}: {error}")
    return None


def measured(machine: Machine) -> dict[str, Any]:
    """Loss, norm and documents of the trainer's next step, whose update is not made."""
    trainer, loader = machine.trainer, machine.loader
    loss, norm = trainer.measured()
    while trainer.loss_scale.too_large(loss, norm):
        loss, norm = trainer.measured()
    gradients = ((name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None)
    own = [*document_losses(trainer, loader, machine.corpus.tokenizer)]
    parts = [json.loads(part) for part in trainer.mesh.gather(json.dumps(own).encode())]
    first = loader.first_row + trainer.data_step * loader.batch_rows
    return {
        "loss": written(loss),
        "grad_norm": written(norm),
        "lr": trainer.lr_at(trainer.step + 1),
        "finite": math.isfinite(loss) and math.isfinite(norm),
        "spoiled_weight": first_spoiled_weight(trainer),
        "spoiled_gradient": next((name for name, g in gradients if not g.isfinite().all()), None),
        "rows": [first, first + loader.batch_rows - 1],
        "documents": worst_first([document for part in parts for document in part]),
    }


def recorded(run: Path, step: int) -> dict[str, Any] | None:
    """What metrics.jsonl says of the step, the last time that it was made or refused on the run's own timeline."""
    rows, _ = read_rows(run / "metrics.jsonl")
    found = None
    for row in current(rows, steps_back(rows)):
        made = row.get("kind") == "train" and row["step"] == step
        if made or (row.get("name") == "non_finite" and row.get("at_step") == step):
            found = {key: row.get(key) for key in ("loss", "grad_norm", "lr")}
    return found


def spoiling(machine: Machine) -> dict[str, Any]:
    """The first module, as they compute, whose output is not finite: in the uncompiled model, row by row."""
    trainer = machine.trainer
    for row, batch in row_batches(trainer, machine.loader):
        with torch.no_grad(), watched(trainer.model) as found, autocast(trainer.config.precision, trainer.mesh.device):
            idx, targets, positions, cu_seqlens, keys = batch.to(trainer.mesh.device)
            places = {"positions": positions, "cu_seqlens": cu_seqlens}
            loss = loss_sum(trainer.model, idx, targets, **places, dropout_keys=keys)
        if found:
            return {"first_not_finite": {"row": row, **found[0]}}
        if not loss.isfinite():
            return {"first_not_finite": {"row": row, "module": "the loss", "inputs_finite": True}}
    return {"first_not_finite": None}


def row_batches(trainer: Trainer, loader: Loader) -> Iterator[tuple[int, Batch]]:
    yield from zip(loader.step_rows(trainer.data_step), loader.step(trainer.data_step, 1))


@contextmanager
def watched(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The modules whose output is not finite, in the order in which they are done."""
    found: list[dict[str, Any]] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            given = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
            healthy = all(bool(x.isfinite().all()) for x in given)
            found.append({"module": name, "kind": type(module).__name__, "inputs_finite": healthy})

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
