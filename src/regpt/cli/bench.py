"""`regpt bench`: how fast training is on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from regpt.cli.output import check_json, show
from regpt.cli.parse import run_subcommand
from regpt.cli.train import parse_over_recipe
from regpt.config import RunConfig
from regpt.console.lines import status
from regpt.ranges import MANY, PROCESSES, Range

JsonFile = Annotated[str | None, tyro.conf.arg(metavar="FILE")]


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
    json: JsonFile = None
    """Also write the report to this file; - prints it as JSON instead."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    """Call the subcommand."""
    purpose = "tokens/s, MFU, memory and time to the first step of a recipe"
    return run_subcommand("regpt bench", args, {"train": (train_main, purpose)})


def train_main(args: list[str]) -> int:
    given: BenchTrainArgs = parse_over_recipe(BenchTrainArgs, args, "regpt bench train")
    check_json(given.json)
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import launcher_rank, launcher_world_size, under_launcher
    from regpt.runs.bench import Window, bench_train, check_bench
    from regpt.tools.bench.tables import train_table

    window = Window(given.steps, given.warmup)
    if launcher_rank() == 0:
        check_bench(given.config, window, given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["bench", "train", *args])
    with status(quiet=launcher_rank() > 0) as say:
        report = bench_train(given.config, window, recipe=given.recipe, progress=say)
    if report is not None:
        show(report, given.json, train_table)
    return 0
