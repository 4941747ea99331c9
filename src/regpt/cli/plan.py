"""`regpt plan`: what a run will take, before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from regpt.cli.train import parse_over_recipe
from regpt.config import RunConfig
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import counted, duration, si
from regpt.ranges import LARGE, MANY, Range


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
    """Calculate with this share of the peak, such as 0.4, instead of the predicted one."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    given: PlanArgs = parse_over_recipe(PlanArgs, args, "regpt plan")
    from regpt.runs.build import open_shards
    from regpt.runs.plan import make_plan

    config = given.config
    corpus = open_shards(config) if config.data.path or config.data.mixture else None
    flags = {"gpu": given.gpu, "gpus": given.gpus, "price": given.price, "mfu": given.mfu}
    plan = make_plan(config, given.recipe, **flags, corpus=corpus)
    if given.json:
        print_json(plan)
    else:
        print_plan(plan)
    return 0


def print_plan(plan: dict[str, Any]) -> None:
    machine = plan["machine"]
    count = f"{machine['count']} × " if machine["kind"] == "gpu" else ""
    print_line(f"{plan['recipe']} on {count}{machine['name']}")
    print_rows((), list(lines(plan)), left=(0, 1))
    for warning in plan["warnings"]:
        print_line(f"warning: {warning}")


def micro_batches(run: dict[str, Any]) -> str:
    return f"{run['accumulation']} × {counted(run['micro_batch_rows'], 'row')} of {run['seq_len']:,}"


def lines(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line; an empty name continues the line before."""
    model, run, data, memory, disk, time = (plan[key] for key in ("model", "run", "data", "memory", "disk", "time"))
    idle = model["active_parameters"] != model["parameters"]
    active = f" ({model['active_parameters']:,} of them compute a token)" if idle else ""
    if "trained_parameters" in model:
        active += f" ({model['trained_parameters']:,} in adapters are trained)"
    yield "model", f"{model['parameters']:,} parameters{active}, {si(model['flops_per_token'], 'FLOP')} a token"
    ratio = f"{run['tokens_per_parameter']:.3g} a parameter, {run['optimal_tokens_per_parameter']} are compute-optimal"
    times = f" in {len(run['stages'])} stages" if run["stages"] else f" × {run['batch_tokens']:,}"
    total = f"{counted(run['steps'], 'step')}{times} = {si(run['tokens'])} tokens ({ratio})"
    yield "run", f"{total}, {si(run['flops'], 'FLOP')}"
    if not run["stages"]:
        yield "a step", f"{micro_batches(run)} on each device, {run['precision']}"
    for number, one in enumerate(run["stages"], start=1):
        size = f"{counted(one['steps'], 'step')} × {one['batch_tokens']:,}, {micro_batches(one)}"
        takes = f"{one['step_ms']:,.1f} ms a step, {duration(3600 * one['hours'])}"
        yield f"stage {number}", f"{size}, needs {one['needed_gib']:.2f} GiB, {takes}"
    if data:
        yield "data", f"{data['path']}: {si(data['train_tokens'])} training tokens, read {data['epochs']:.3g} times"
        if "conversations" in data:
            yield "", data["conversations"]
    peak = f"{memory['peak_gib']:.2f} GiB of {memory['of']} at the peak ({memory['path']})"
    host = f", moments of {memory['host_gib']:.2f} GiB in host memory" if memory["host_gib"] else ""
    largest = memory["largest_micro_batch_rows"]
    fits = f"; up to {largest} rows at once fit" if largest else ""
    yield "memory", f"{peak}{host}, needs {memory['needed_gib']:.2f} of {memory['available_gib']:.1f} GiB{fits}"
    yield "", " · ".join(f"{name} {size:.2f}" for name, size in memory["parts_gib"].items() if size >= 0.005)
    free = "" if disk["free_gib"] is None else f"; {disk['free_gib']:,.0f} GiB free here"
    kept = f"{disk['checkpoints']} × {disk['checkpoint_gib']:.2f} GiB of checkpoints"
    yield "disk", f"data {disk['data_gib']:.2f} GiB ({disk['data_is']}), {kept}{free}"
    yield "time", f"{duration(3600 * time['hours'])}, {duration(3600 * time['validation_hours'])} of it validation"
    mfu = f"MFU {time['mfu']:.1%} of {plan['machine']['peak_tflops']:,.4g} TFLOP/s each"
    yield "", f"{time['step_ms']:,.1f} ms a step, {time['tokens_per_s']:,.0f} tokens/s, {mfu}"
    yield "", " · ".join(f"{name} {ms:,.1f}" for name, ms in time["parts_ms"].items() if ms >= 0.05) + " ms"
    yield "", f"{time['how']}; peak: {plan['machine']['how']}"
    if cost := plan["cost"]:
        hour = f"{cost['gpu_hours']:,.2f} GPU hours at {cost['price_per_gpu_hour']:,.2f}"
        yield "cost", f"{cost['total']:,.2f} ({hour})"
