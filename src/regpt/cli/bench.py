"""`regpt bench`: how fast training, batches and sampling are on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from regpt.cli.parse import parse
from regpt.cli.train import chosen_data, named_recipe
from regpt.config import RunConfig, read_config, recipe_names
from regpt.errors import UsageError, UserError, nearest

# Where torch.compile and Triton keep what they have compiled.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class TrainArgs:
    """Time the training of a recipe: the trainer, loader and settings of `regpt train`, for a few steps. Every value of
    the configuration is a flag, as there."""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    steps: int = 20
    """Steps that are timed."""
    warmup: int = 5
    """Steps before them, the first one with its compilation included."""
    nproc: int = 0
    """Start this many processes on this machine (torchrun): one a GPU, or several on the CPU."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards, or several as DIR=WEIGHT; without it, invented tokens."""
    cold: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile from an empty cache, as on a machine that has never done it."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file; - prints it as JSON instead."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class LadderArgs:
    """Climb the lecture's ladder on this device: float32, TF32, bfloat16, torch.compile, flash attention, padded
    vocabulary, fused AdamW, and what this package adds. Each rung trains the same model on invented tokens."""

    model: Annotated[str, tyro.conf.arg(metavar="RECIPE|FILE")] = ""
    """Recipe whose model is trained; default: gpt2-124m on a GPU, gpt2-tiny on a CPU."""
    rows: int = 0
    """Rows a step; default: 16 on a GPU, as in the lecture, the recipe's train.micro_batch_rows on a CPU."""
    steps: int = 20
    """Steps of each rung that are timed."""
    warmup: int = 3
    """Steps before them."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.png|.svg")] = None
    """Also draw the ladder into this file."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file, rung by rung; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    """Hand over to the subcommand."""
    commands = {"train": train_main, "ladder": ladder_main}
    if args[:1] in (["--help"], ["-h"]):
        print(f"usage: regpt bench {{{','.join(commands)}}} …\n")
        print("  train    tokens/s, MFU, memory and time to the first step of a recipe")
        print("  ladder   what makes training fast, change by change, on this device")
        return 0
    if not args:
        raise UsageError(f"regpt bench needs a command; choose from {', '.join(commands)}")
    if args[0] not in commands:
        hint = nearest(args[0], commands)
        raise UsageError(f"regpt bench has no command {args[0]!r}{hint}; choose from {', '.join(commands)}")
    return commands[args[0]](args[1:])


def train_main(args: list[str]) -> int:
    started = time.perf_counter()
    recipe = named_recipe([arg for arg in args if arg != "--cold"])  # the one flag that takes no value
    over = TrainArgs(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(TrainArgs, args, prog="regpt bench train", default=over)
    if not given.recipe:
        raise UsageError(f"no recipe was given; regpt bench train RECIPE, with one of {', '.join(recipe_names())}")
    if given.nproc < 0:
        raise UsageError(f"--nproc is {given.nproc}, must be at least 1, or 0 for this process alone")
    check_json(given.json)
    with fresh_caches() if given.cold else contextlib.nullcontext():
        return run_train(given, args, started)


def run_train(given: TrainArgs, args: list[str], started: float) -> int:
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import launcher_rank, launcher_world_size, under_launcher
    from regpt.runs.bench import Window, bench_train, check

    window, config = Window(given.steps, given.warmup), given.config
    if given.data:
        config = replace(config, data=chosen_data(config.data, given.data))
    if launcher_rank() == 0:
        check(config, given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["bench", "train", *args])
    imported_s = time.perf_counter() - started
    with progress(quiet=launcher_rank() > 0) as say:
        report = bench_train(config, window, recipe=given.recipe, imported_s=imported_s, progress=say)
    if report is not None:
        from regpt.tools.bench.tables import train_table

        show(report, given.json, train_table)
    return 0


def ladder_main(args: list[str]) -> int:
    given = parse(LadderArgs, args, prog="regpt bench ladder")
    check_json(given.json)
    from regpt.parallel.mesh import choose_device, under_launcher
    from regpt.runs.bench import Window
    from regpt.runs.bench_ladder import bench_ladder
    from regpt.tools.bench.ladder import LADDER, LECTURE_ROWS
    from regpt.tools.bench.picture import check_picture, draw_ladder
    from regpt.tools.bench.tables import ladder_table

    if given.out:
        check_picture(Path(given.out))
    if under_launcher():
        raise UsageError("regpt bench ladder runs in one process; start it without torchrun")
    window, on_gpu = Window(given.steps, given.warmup), choose_device(given.device).type == "cuda"
    name = given.model or ("gpt2-124m" if on_gpu else "gpt2-tiny")
    config = read_config(name)
    config = replace(config, train=replace(config.train, device=given.device))
    rows = given.rows or (LECTURE_ROWS if on_gpu else config.train.first_rows)
    target = None if given.json in (None, "-") else Path(given.json)
    keep = partial(write_json, target) if target else lambda report: None
    with progress() as say:
        report = bench_ladder(config, LADDER, window, name=name, rows=rows, progress=say, keep=keep)
    show(report, given.json, ladder_table)
    if given.out:
        draw_ladder(report, Path(given.out))
        print(f"drawn: {given.out}", file=sys.stderr)
    return 0


def show(report: dict[str, Any], target: str | None, table: Callable[[dict[str, Any]], Any]) -> None:
    """The report as a table, and as JSON in the file `target`; only as JSON where that is `-`."""
    from rich.console import Console

    if target == "-":
        print(json.dumps(report, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 140  # what reads it wraps it itself
    console.print(table(report))
    if target is not None:
        write_json(Path(target), report)
        console.print(f"written: {target}", highlight=False)


def check_json(target: str | None) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what it would hold."""
    if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
        raise UserError(f"--json {target}: the folder does not exist; make it first")


def write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); choose another file for --json") from None


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """`say(text)`: what is being done now, on the terminal's error stream; nothing where there is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(Text(text))


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
