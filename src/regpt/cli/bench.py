"""`regpt bench`: how fast training is on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt.cli.parse import OTHER_JSON, check_json, run_subcommand
from regpt.cli.train import parse_over_recipe
from regpt.config import RunConfig
from regpt.console.lines import print_json, print_line, print_rows, status
from regpt.console.text import counted
from regpt.files import write_json
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

    window = Window(given.steps, given.warmup)
    if launcher_rank() == 0:
        check_bench(given.config, window, given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["bench", "train", *args])
    with status(quiet=launcher_rank() > 0) as say:
        report = bench_train(given.config, window, recipe=given.recipe, progress=say)
    if report is not None and given.json == "-":
        print_json(report)
    elif report is not None:
        if given.json is not None:
            write_json(Path(given.json), report, OTHER_JSON)
        size, device = (
            f"{report['parameters']:,} parameters{adapters_of(report)}",
            f"{report['world_size']} × {report['device']}",
        )
        print_line(f"{report['recipe']}: {size} on {device}")
        print_rows((), list(figures(report).items()), left=(0, 1))
    return 0


def adapters_of(report: dict[str, Any]) -> str:
    found = report["adapter"]
    if found is None:
        return ""
    base = "" if found["base"] == "none" else f", the base in {found['base']}"
    return f" ({found['trained']:,} in adapters of rank {found['r']} learn{base})"


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Name and text of each line of the report."""
    ms, world, memory = report["step_ms"], report["world_size"], report["peak_memory_gib"]
    product, listed, found, kernels = report["product"], report["data_sheet"], report["versions"], report["kernels"]
    each = f" ({report['tokens_per_s_per_device']:,.0f} each of {world})" if world > 1 else ""
    sheet = f"{report['mfu']:.1%} of {listed['tflops']:,.4g} TFLOP/s, dense {listed['precision']}" if listed else None
    whose = {"gpu": " on the GPU", "process": " of the process"}[report["peak_memory_of"]]
    whose += ", the largest of all processes" if world > 1 else ""
    attention = f", attention {report['attention']}" if report["attention"] else ""
    names = [f"{name} {found[name]}" for name in ("torch", "cuda", "cudnn", "triton", "python") if found[name]]
    return {
        "tokens/s": f"{report['tokens_per_s']:,.0f}{each}",
        "a step": f"{ms['median']:,.1f} ms (p10 {ms['p10']:,.1f}, p90 {ms['p90']:,.1f}, spread {ms['spread']:.1%}), "
        f"{counted(report['steps'], 'step')} after {report['warmup']}",
        "MFU, data sheet": sheet or "this device has none in the table",
        "of a product": f"{report['share_of_product']:.1%} of {product['tflops']:,.4g} TFLOP/s that a {product['n']}³ "
        f"{product['precision']} product reached here",
        "peak memory": "not counted on this system" if memory is None else f"{memory:.2f} GiB{whose}",
        "first step after": f"{report['first_step_s']:.1f} s, compilation included",
        "batch": f"{report['batch_tokens']:,} tokens: {report['accumulation']} × {world} × "
        f"{counted(report['micro_batch_rows'], 'row')} of {report['seq_len']}; {report['data']}",
        "active": f"{report['precision']}, {kernels['name']} kernels ({kernels['reason']})"
        f"{', compiled' if report['compile'] else ''}{attention}, {'fused ' if report['fused_adamw'] else ''}AdamW",
        "versions": ", ".join(names),
    }
