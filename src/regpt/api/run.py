"""Train, resume and evaluate from Python: the command line's own composition roots, in this process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regpt.api.arguments import check_options, checked, hints_of
from regpt.api.metrics import TrainingRun, read_run
from regpt.checkpoint.state import generator_states, restore_generators
from regpt.config import RunConfig, overlay, read_config, validate_config
from regpt.errors import UsageError
from regpt.evals.specs import check_specs, parse_tasks
from regpt.parallel.mesh import choose_device, launcher_rank, launcher_world_size, open_mesh
from regpt.runs.evaluate import EvalRequest, evaluate_model, rows, silent
from regpt.runs.folder import read_run_config
from regpt.runs.pretrain import check, pretrain
from regpt.runs.pretrain import resume as resume_run
from regpt.runs.stop import PoliteStop

Place = str | os.PathLike[str]


@checked
def train(
    recipe: Place | RunConfig,
    out: Place,
    *,
    data: Place | Mapping[str, Any] | None = None,
    init_from: Place | None = None,
    quiet: bool = False,
    **sections: Mapping[str, Any],
) -> TrainingRun:
    """Train a model in this process, as `regpt train` does, into the new folder `out`; returns the run.

    Args:
        recipe: a recipe by name, a .toml file, or a `RunConfig`.
        out: folder that does not exist yet.
        data: folder of token shards; or the section `[data]`, whose `path` names it.
        init_from: start from the weights of this model.
        quiet: print nothing.
        sections: values over those of the recipe, by section: `train={"steps": 10}, model={"n_layer": 2}`.

    Raises:
        UsageError: an unknown recipe, section or key, or a value that is not allowed.
        UserError: data that does not fit, a folder that is not empty, a loss that is not finite, a full disk.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and the run saved; go on with `resume`.
    """
    base = recipe if isinstance(recipe, RunConfig) else read_config(os.fspath(recipe))
    if isinstance(data, str | os.PathLike):
        data = {"path": os.fspath(data), "mixture": {}}
    config = changed(base, sections if data is None else {"data": data, **sections})
    run = Path(out)
    if launcher_rank() == 0:
        check(config, run, processes=launcher_world_size())
    model = None if init_from is None else os.fspath(init_from)
    return fitted(
        run, config, lambda stop: pretrain(config, run, init_from=model, argv=sys.argv, quiet=quiet, stop=stop)
    )


@checked
def resume(run: Place, *, force: bool = False, quiet: bool = False, **sections: Mapping[str, Any]) -> TrainingRun:
    """Go on with a run from its newest intact checkpoint, as `regpt train --resume`; returns it.

    Args:
        run: its folder.
        force: also with settings that make another run of it.
        quiet: print nothing.
        sections: changed settings, as for `train`.

    Raises:
        As `train`.
    """
    folder = Path(run)
    config = changed(read_run_config(folder), sections)
    if launcher_rank() == 0:
        check(config, None, processes=launcher_world_size())
    return fitted(folder, config, lambda stop: resume_run(folder, config, force=force, quiet=quiet, stop=stop))


@checked
def evaluate(
    model: Place,
    tasks: str | Sequence[str] = "val",
    *,
    data: Place | None = None,
    device: str = "auto",
    **options: Any,
) -> list[dict[str, Any]]:
    """Evaluate a model as `regpt eval` does; a row a task and metric: `task`, `metric`, `value`, `stderr`, `n`.

    Args:
        model: as for `load`.
        tasks: `val`, `hellaswag`, `core:DIR`, `mc:FILE`, `conversations:FILE`, `lm-eval:NAME`; a list, or one text
            with commas.
        data: `val`: folder of token shards; None is the run's own.
        device: as for `load`.
        options: the rest of `regpt.runs.evaluate.EvalRequest`: `val_tokens`, `seq_len`, `batch_rows`, `precision`,
            `compile`, `max_items`, `ema`; of `conversations` also `few_shot`, `seed`, `retrieve`, `passages`,
            `val_fraction`.

    Raises:
        UsageError: an unknown task, option, model or device.
        UserError: files that cannot be had, data of another tokenizer, a damaged model, too little memory.
    """
    specs = parse_tasks(tasks) if isinstance(tasks, str) else check_specs(tasks)
    if not specs:
        raise UsageError("no task was given; give their names, such as val")
    known = {name: hint for name, hint in hints_of(EvalRequest).items() if name not in ("model", "specs", "data")}
    options = check_options("evaluate", options, known)
    asked = EvalRequest(os.fspath(model), specs, None if data is None else os.fspath(data), **options)
    with global_state_kept(device), open_mesh(device) as mesh:
        return rows(evaluate_model(asked, mesh, silent))


def fitted(run: Path, config: RunConfig, fit: Callable[[PoliteStop], int]) -> TrainingRun:
    """`fit` in a process that is not ours, then the run."""
    stop = PoliteStop()
    with global_state_kept(config.train.device):
        if "torch._dynamo" in sys.modules:  # it compiles a function a few times only, then runs it slowly (its
            torch.compiler.reset()  # recompile_limit): each run begins with none of the last
        fit(stop)
    stop.deliver()
    return read_run(run)


def changed(config: RunConfig, sections: Mapping[str, Any]) -> RunConfig:
    """`config` with the values of `sections`, checked."""
    for name, values in sections.items():
        if not isinstance(values, Mapping):
            key, _, rest = name.partition(".")
            example = f"{key}={{{rest!r}: {values!r}}}" if rest else f"{name}={{…}}, a dict of its keys"
            raise UsageError(f"{name}={values!r} is not a section of the configuration; write {example}")
    return validate_config(overlay(config.sections(), plain(sections)), "the settings given")


def plain(value: Any) -> Any:
    """`value` as TOML has it: NumPy's numbers and paths as Python's own."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


@contextlib.contextmanager
def global_state_kept(device_name: str) -> Iterator[None]:
    """Restore torch's settings and every global random generator when the context ends, however it ends."""
    device = choose_device(device_name)
    generators = generator_states(device)
    matmul, threads, kind = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
        restore_generators(generators, device)
