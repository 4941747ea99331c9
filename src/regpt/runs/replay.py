"""Recompute one step of a run from the checkpoint before it."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regpt.checkpoint.load import Checkpoint, checkpoints, load_checkpoint, print_warning, step_of
from regpt.config import RunConfig, drop_none, validate_config
from regpt.errors import UsageError, UserError
from regpt.files import unless_gone
from regpt.report.read import current, read_rows
from regpt.runs.begin import Run, refuse_changed_data, run_mesh, start_again, start_at
from regpt.runs.changes import Changes, changes, is_free, listed
from regpt.runs.examine import document_losses, first_spoiled_weight, worst_first
from regpt.runs.folder import read_run_config
from regpt.structured import read_object
from regpt.tensors import REMEDY
from regpt.train.objective import NextToken
from regpt.train.precision import autocast
from regpt.train.trainer import json_number

PLACES = ("data.path", "data.mixture", "data.tokenizer", "train.device")


def replay(folder: Path, step: int, config: RunConfig | None = None, *, op_level: bool = False) -> dict[str, Any]:
    """Loss, norm and documents of update `step` of the run in `folder`, where nothing changes.

    The updates between the checkpoint and it are made again. In as many processes as the run had, with
    `train.deterministic`, or on one machine with the same kernels, the numbers are those of the run, bitwise.

    Args:
        step: counted from 1, as in metrics.jsonl.
        config: that of the update, with other places of the same shards; default: as the run has it.
        op_level: also look for the first module whose output is not finite.

    Raises:
        UsageError: a step that the run does not have.
        UserError: no run, changed shards, or an update on the way that cannot be made.
    """
    config = config or config_of(folder, step)
    if not 1 <= step <= config.train.steps:
        raise UsageError(f"--step is {step}, must be from 1 to the {config.train.steps} of the run")
    with run_mesh(config) as mesh, ExitStack() as stack:
        run = Run(config, mesh)
        before = checkpoint_before(folder, step)
        if before is None:
            env = read_object(folder / "env.json", REMEDY)
            refuse_changed_data(env["data"]["manifest_sha256"], folder, run.corpus)
            start = start_again(run, folder, env, {})
        else:
            refuse_changed_data(before.state.data.manifest_sha256, before.folder, run.corpus)
            start = start_at(run, before, {}, changes(before.state.config, run.config.sections()))
        refuse_mixed(folder, start.step, step)
        run.begin(start, stack)
        if run.trainer.step >= step:
            raise UsageError(f"run {str(folder)!r} began at step {run.trainer.step}; give a later --step")
        while run.trainer.step < step - 1:
            result = run.trainer.train_step()
            if result.verdict is not None:
                run.trainer.apply_verdict(result)
        facts = {"run": str(folder), "step": step, "from_step": start.step, "world_size": mesh.world_size}
        found = facts | measured(run) | {"recorded": recorded(folder, step)}
        return found | (spoiling(run) if op_level else {})


def config_of(run: Path, step: int) -> RunConfig:
    """The configuration that update `step` was made with: config.toml without what later resumes changed; where the
    data and the device are stays as it is."""
    sections = read_run_config(run).sections()
    for resumed, found in reversed(changes_on_resume(run)):
        for key, (before, _) in found.items():
            section, _, name = key.partition(".")
            if resumed >= step and key not in PLACES and section in sections:
                sections[section] |= {name: before}
    return validate_config(drop_none(sections), str(run))


def changes_on_resume(run: Path) -> list[tuple[int, Changes]]:
    """What each resume on the run's own timeline changed, and after how many updates that counts."""
    found: list[tuple[int, Changes]] = []
    rows, _ = read_rows(run / "metrics.jsonl")
    for row in rows:
        if row.get("name") == "rewind":  # the same settings again, for earlier updates
            found = [(min(step, row["step"]), changed) for step, changed in found]
        if row.get("name") == "resume":  # what an attempt changed that made no checkpoint of its own, is gone
            found = [(step, changed) for step, changed in found if step < row["step"]]
            found.append((row["step"], row.get("changed") or {}))
    return found


def refuse_mixed(run: Path, begin: int, step: int) -> None:
    """Raise a UserError unless all updates from `begin` to `step` were made with the same settings."""
    for resumed, found in changes_on_resume(run):
        serious = {key: pair for key, pair in found.items() if not is_free(key)}
        if begin < resumed < step and serious:
            raise UserError(
                f"update {step} follows from the checkpoint of step {begin} with two settings, as the run was resumed "
                f"after step {resumed} with others ({listed(serious)}); replay a step up to {resumed}, or one after a "
                "checkpoint that is left"
            )


def checkpoint_before(run: Path, step: int) -> Checkpoint | None:
    """The newest valid checkpoint of fewer than `step` updates."""
    for folder in reversed([folder for folder in checkpoints(run) if step_of(folder) < step]):
        try:
            if found := unless_gone(folder, partial(load_checkpoint, folder)):
                return found
        except UserError as error:
            print_warning(f"skipped {folder.name}: {error}")
    return None


def measured(run: Run) -> dict[str, Any]:
    """Loss, norm and documents of the trainer's next step, whose update is not made."""
    trainer, loader = run.trainer, run.loader.at(run.trainer.data_step)
    loss, norm, _ = trainer.gradients()
    while trainer.loss_scale.backs_off(loss, norm):
        loss, norm, _ = trainer.gradients()
    gradients = ((name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None)
    own = [*document_losses(trainer, loader, run.corpus.tokenizer)]
    parts = [json.loads(part) for part in trainer.mesh.gather(json.dumps(own).encode())]
    first = loader.first_row + trainer.data_step * loader.batch_rows
    return {
        "loss": json_number(loss),
        "grad_norm": json_number(norm),
        "lr": run.config.optim.lr * trainer.schedule(trainer.step + 1),
        "finite": math.isfinite(loss) and math.isfinite(norm),
        "spoiled_weight": first_spoiled_weight(trainer),
        "spoiled_gradient": next((name for name, g in gradients if not g.isfinite().all()), None),
        "rows": [first, first + loader.batch_rows - 1],
        "documents": worst_first([document for part in parts for document in part]),
    }


def recorded(run: Path, step: int) -> dict[str, Any] | None:
    """The row of metrics.jsonl of the step: the last one that was made or refused on the run's own timeline."""
    rows, _ = read_rows(run / "metrics.jsonl")
    found = None
    for row in current(rows):
        made = row.get("kind") == "train" and row["step"] == step
        if made or (row.get("name") == "non_finite" and row.get("at_step") == step):
            found = {key: row.get(key) for key in ("loss", "grad_norm", "lr")}
    return found


def spoiling(run: Run) -> dict[str, Any]:
    """The first module, as they compute, whose output is not finite: in the uncompiled model, row by row."""
    trainer = run.trainer
    loader = run.loader.at(trainer.data_step)
    for row, batch in zip(loader.step_rows(trainer.data_step), loader.step(trainer.data_step, 1)):
        number_format = autocast(trainer.config.autocast_precision, trainer.mesh.device)
        with torch.no_grad(), watched(trainer.model) as found, number_format:
            loss = NextToken(trainer.model).loss_sum(batch.to(trainer.mesh.device))[0]
        if found:
            return {"first_not_finite": {"row": row, **found[0]}}
        if not loss.isfinite():
            return {"first_not_finite": {"row": row, "module": "the loss", "inputs_finite": True}}
    return {"first_not_finite": None}


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
