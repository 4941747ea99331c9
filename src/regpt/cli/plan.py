"""`regpt plan`: what a run will take, before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import parse
from regpt.cli.train import chosen_data, named_recipe
from regpt.config import RunConfig, read_config, recipe_names
from regpt.console.lines import print_json, print_line
from regpt.console.text import counted
from regpt.errors import UsageError
from regpt.ranges import LARGE, MANY, Range

if TYPE_CHECKING:
    from regpt.runs.build import Corpus
    from regpt.tools.plan.request import DataFacts


@dataclass(frozen=True)
class PlanArgs:
    """Parameters, FLOPs, memory by part, the largest micro-batch, disk, hours and cost of a run. Every value of the
    configuration is a flag, as in `regpt train`."""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards, or several as DIR=WEIGHT: how often will it be read?"""
    gpu: str = ""
    """Plan for this GPU (h100, a100-40gb, rtx4090, … see docs/plan.md) or for cpu; default: this machine."""
    gpus: Annotated[int, Range(1, MANY)] = 1
    """How many of them, in one host."""
    price: Annotated[float | None, Range(0, LARGE)] = None
    """Price of one GPU for an hour, in any currency."""
    mfu: Annotated[float | None, Range(0, 1, above=True)] = None
    """Reckon with this share of the peak, such as 0.4, instead of the predicted one."""
    scaling: Annotated[str, tyro.conf.arg(metavar="FILE.json")] = ""
    """A fitted scaling law, from `regpt scaling`: also predict the loss."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    recipe = named_recipe(PlanArgs, args, prog="regpt plan")
    over = PlanArgs(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(PlanArgs, args, prog="regpt plan", default=over)
    if not given.recipe:
        raise UsageError(f"no recipe was given; regpt plan RECIPE, with one of {', '.join(recipe_names())}")
    from regpt.report.scaling_law import read_law
    from regpt.tools.plan.plan import make_plan
    from regpt.tools.plan.request import PlanRequest, RunSections

    law = read_law(Path(given.scaling)) if given.scaling else None
    request = PlanRequest(given.recipe, given.gpu, given.gpus, given.price, given.mfu, law)
    config = given.config
    if given.data:
        config = replace(config, data=chosen_data(config.data, given.data))
    corpus = data_of(config)
    config = config.with_vocab_size(corpus.vocab_size) if corpus else config.with_vocab_size()
    facts = data_facts(corpus) if corpus else None
    run = RunSections(config.model, config.data, config.train, config.optim, config.eval, config.checkpoint)
    plan = make_plan(run, request, facts)
    if given.json:
        print_json(plan)
    else:
        print_plan(plan)
    return 0


def data_of(config: RunConfig) -> Corpus | None:
    """The data folders; raises what `regpt train` would. None without data."""
    from regpt.runs.build import open_shards

    return open_shards(config) if config.data.path or config.data.mixture else None


def data_facts(corpus: Corpus) -> DataFacts:
    """What the data folders hold."""
    from regpt.tools.plan.request import DataFacts

    disk_bytes = sum(
        shard.tokens * folder.manifest.numpy_dtype.itemsize + 8 * shard.documents
        for folder in corpus.folders
        for shard in folder.manifest.shards
    )
    path = " + ".join(str(folder.path) for folder in corpus.folders)
    return DataFacts(path, corpus.tokens("train"), corpus.tokens("val"), disk_bytes)


def print_plan(plan: dict[str, Any]) -> None:
    from rich.table import Table

    from regpt.console.tables import print_table

    machine = plan["machine"]
    count = f"{machine['count']} × " if machine["kind"] == "gpu" else ""
    print_line(f"{plan['recipe']} on {count}{machine['name']}")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines(plan):
        table.add_row(name, text)
    print_table(table)
    for warning in plan["warnings"]:
        print_line(f"warning: {warning}")


def lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What is shown: name of a line, its text; an empty name continues the line before."""
    model = plan["model"]
    return [
        ("model", f"{model['parameters']:,} parameters, {si_text(model['flops_per_token'])}FLOP a token"),
        *run_lines(plan["run"], plan["data"]),
        *memory_lines(plan["memory"], plan["run"]),
        *disk_lines(plan["disk"]),
        *time_lines(plan["time"], plan["machine"]),
        *cost_lines(plan["cost"]),
        *loss_lines(plan["loss"]),
    ]


def run_lines(run: dict[str, Any], data: dict[str, Any] | None) -> list[tuple[str, str]]:
    ratio = f"{run['tokens_per_parameter']:.3g} a parameter, {run['optimal_tokens_per_parameter']} are compute-optimal"
    total = f"{counted(run['steps'], 'step')} × {run['batch_tokens']:,} = {count(run['tokens'])} tokens ({ratio}), "
    found = [("run", f"{total}{si_text(run['flops'])}FLOP")]
    each = f"{run['accumulation']} × {counted(run['micro_batch_rows'], 'row')} of {run['seq_len']:,}"
    found.append(("a step", f"{each} on each device, {run['precision']}"))
    if data:
        size = f"{count(data['train_tokens'])} training tokens, read {data['epochs']:.3g} times"
        found.append(("data", f"{data['path']}: {size}"))
    return found


def memory_lines(memory: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    largest = memory["largest_micro_batch_rows"]
    fits = f"; up to {largest} rows at once fit" if largest else ""
    peak = f"{memory['peak_gib']:.2f} GiB of {memory['of']} at the peak ({memory['path']})"
    parts = [f"{name} {size:.2f}" for name, size in memory["parts_gib"].items() if size >= 0.005]
    host = f", moments of {memory['host_gib']:.2f} GiB in host memory" if memory["host_gib"] else ""
    return [
        ("memory", f"{peak}{host}, needs {memory['needed_gib']:.2f} of {memory['available_gib']:.1f} GiB{fits}"),
        ("", " · ".join(parts)),
    ]


def disk_lines(disk: dict[str, Any]) -> list[tuple[str, str]]:
    free = "" if disk["free_gib"] is None else f"; {disk['free_gib']:,.0f} GiB free here"
    data = f"data {disk['data_gib']:.2f} GiB ({disk['data_is']})"
    kept = f"{disk['checkpoints']} × {disk['checkpoint_gib']:.2f} GiB of checkpoints"
    return [("disk", f"{data}, {kept}{free}")]


def time_lines(time: dict[str, Any], machine: dict[str, Any]) -> list[tuple[str, str]]:
    mfu = f"MFU {time['mfu']:.1%} of {machine['peak_tflops']:,.4g} TFLOP/s each"
    step = f"{time['step_ms']:,.1f} ms a step, {time['tokens_per_s']:,.0f} tokens/s, {mfu}"
    parts = [f"{name} {ms:,.1f}" for name, ms in time["parts_ms"].items() if ms >= 0.05]
    return [
        ("time", f"{hours(time['hours'])}, {hours(time['validation_hours'])} of it validation"),
        ("", step),
        ("", " · ".join(parts) + " ms"),
        ("", f"{time['how']}; peak: {machine['how']}"),
    ]


def cost_lines(cost: dict[str, Any] | None) -> list[tuple[str, str]]:
    if cost is None:
        return []
    hour = f"{cost['gpu_hours']:,.2f} GPU hours at {cost['price_per_gpu_hour']:,.2f}"
    return [("cost", f"{cost['total']:,.2f} ({hour})")]


def loss_lines(loss: dict[str, Any] | None) -> list[tuple[str, str]]:
    if loss is None:
        return []
    error = "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.3f}"
    return [("loss", f"{loss['loss']:.3f}{error} {loss['unit']} at the end, by the fitted law")]


def hours(h: float) -> str:
    """`3.2 days`, `5.8 hours`, `12 minutes`, `40 seconds`."""
    for unit, size in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if h >= 2 * size or (unit == "hours" and h >= 1):
            return f"{h / size:.3g} {unit}"
    return f"{h * 3600:.3g} seconds"


def count(n: int) -> str:
    """`712 thousand`, `10.0 billion`."""
    for word, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if n >= size:
            return f"{n / size:,.3g} {word}"
    return str(n)


def si_text(number: float) -> str:
    """`number` with its prefix, as the terminal of a run writes it."""
    from regpt.runs.terminal import si_spaced

    return si_spaced(number)
