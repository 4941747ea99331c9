"""`regpt bench`: how fast training and sampling are on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt import STARTED
from regpt.cli.output import check_json, show
from regpt.cli.parse import parse, run_subcommand
from regpt.cli.train import parse_over_recipe
from regpt.config import RunConfig, read_config, recipe_names
from regpt.console.lines import status
from regpt.ranges import MANY, PROCESSES, Range
from regpt.train.config import InferencePrecision

if TYPE_CHECKING:
    import torch

    from regpt.model.transformer import Transformer

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
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


@dataclass(frozen=True)
class BenchSampleArgs:
    """Time how fast a model writes, one text at a time and many at once; the prompts are random tokens."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|RECIPE")]
    """A run folder, a checkpoint folder, a Hugging Face folder, a hub name such as gpt2; or a recipe by name, for its
    model with random weights."""
    batch: Annotated[tuple[int, ...], Range(1, 1 << 20)] = (1, 64)
    """Texts at once; several numbers are timed one after another."""
    prompt_tokens: Annotated[int, Range(1, MANY)] = 128
    """Tokens of each prompt."""
    new_tokens: Annotated[int, Range(1, MANY)] = 128
    """Tokens that each text is continued by."""
    repeats: Annotated[int, Range(1, 1 << 20)] = 5
    """Times that each is written, after once without the clock; the median counts."""
    device: DeviceName = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: InferencePrecision = "fp32"
    """Number format of the computation."""
    json: JsonFile = None
    """Also write the report to this file; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    """Call the subcommand."""
    commands = {
        "train": (train_main, "tokens/s, MFU, memory and time to the first step of a recipe"),
        "sample": (sample_main, "tokens/s of a model that writes"),
    }
    return run_subcommand("regpt bench", args, commands)


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
    imported_s = time.perf_counter() - STARTED
    with status(quiet=launcher_rank() > 0) as say:
        report = bench_train(given.config, window, recipe=given.recipe, imported_s=imported_s, progress=say)
    if report is not None:
        show(report, given.json, train_table)
    return 0


def sample_main(args: list[str]) -> int:
    given = parse(BenchSampleArgs, args, prog="regpt bench sample")
    check_json(given.json)
    from regpt.parallel.mesh import choose_device
    from regpt.tools.bench.samples import bench_sample
    from regpt.tools.bench.tables import sample_table
    from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision

    device = choose_device(given.device)
    set_matmul_precision(given.precision)
    with status() as say, autocast(given.precision, device):
        say("opening the model")
        model = open_or_make(given.model, device).to(parameter_dtype(given.precision))
        report = bench_sample(model, given.batch, given.prompt_tokens, given.new_tokens, given.repeats, say)
    heading = {"kind": "bench sample", "source": given.model, "precision": given.precision}
    show(heading | report, given.json, sample_table)
    return 0


def open_or_make(name: str, device: torch.device) -> Transformer:
    """The model `name`; for a recipe's name, its model with random weights."""
    from regpt.checkpoint.open import open_model
    from regpt.model.families import make_model
    from regpt.model.weights import initialize

    if name not in recipe_names():
        return open_model(name, device).model
    config = read_config(name).with_vocab_size()
    return initialize(make_model(config.model).to(device), config.train.seed).eval()
