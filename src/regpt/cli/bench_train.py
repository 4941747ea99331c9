"""`regpt bench train`: the throughput of a recipe on this machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from regpt import STARTED
from regpt.cli.output import check_json, show
from regpt.cli.parse import parse
from regpt.cli.train import chosen_data, named_recipe
from regpt.config import RunConfig, read_config, recipe_names
from regpt.console.lines import status
from regpt.errors import UsageError
from regpt.ranges import MANY, PROCESSES, Range

# Where torch.compile and Triton keep what they have compiled.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class BenchTrainArgs:
    """Time the training of a recipe: the trainer, loader and settings of `regpt train`, for a few steps. Every value of
    the configuration is a flag, as there."""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    steps: Annotated[int, Range(1, MANY)] = 20
    """Steps that are timed."""
    warmup: Annotated[int, Range(1, MANY)] = 5
    """Steps before them, the first one with its compilation included."""
    nproc: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, PROCESSES)] = None
    """Start this many processes on this machine (torchrun): one a GPU, or several on the CPU."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards, or several as DIR=WEIGHT; without it, invented tokens."""
    cold: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile from an empty cache, as on a machine that has never done it."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file; - prints it as JSON instead."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    recipe = named_recipe(BenchTrainArgs, args, prog="regpt bench train")
    over = BenchTrainArgs(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(BenchTrainArgs, args, prog="regpt bench train", default=over)
    if not given.recipe:
        raise UsageError(f"no recipe was given; regpt bench train RECIPE, with one of {', '.join(recipe_names())}")
    check_json(given.json)
    with fresh_caches() if given.cold else contextlib.nullcontext():
        return run_train(given, args)


def run_train(given: BenchTrainArgs, args: list[str]) -> int:
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import launcher_rank, launcher_world_size, under_launcher
    from regpt.runs.bench import Window, bench_train, check_bench

    window, config = Window(given.steps, given.warmup), given.config
    if given.data:
        config = replace(config, data=chosen_data(config.data, given.data))
    if launcher_rank() == 0:
        check_bench(config, window, given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["bench", "train", *args])
    imported_s = time.perf_counter() - STARTED
    with status(quiet=launcher_rank() > 0) as say:
        report = bench_train(config, window, recipe=given.recipe, imported_s=imported_s, progress=say)
    if report is not None:
        from regpt.tools.bench.tables import train_table

        show(report, given.json, train_table)
    return 0


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty compile caches for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(prefix="regpt-cold-", ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in CACHES}
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
