"""`regpt train --profile N`: where the time of N steps goes, as a Chrome trace and a table of the largest costs."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from regpt.console.tables import PlainConsole, print_table
from regpt.train.trainer import Row

WAIT, WARMUP = 2, 1  # steps before the profiled ones: compilation and first allocations; torch's own preparation
LARGEST = 10


@dataclass
class Profile:
    """Steps seen, and those of them that were recorded: number and milliseconds."""

    seen: int = 0
    recorded: dict[int, float] = field(default_factory=dict)


@contextlib.contextmanager
def profiled(
    steps: int, folder: Path, device: torch.device, console: Console, say: Callable[[str], None]
) -> Iterator[Callable[[Row], None]]:
    """A function to be called with every row of metrics; after `WAIT + WARMUP` updates, `steps` are recorded.

    `folder` then holds `trace.json.gz` (chrome://tracing, ui.perfetto.dev), `costs.json` and `costs.txt`, and the table
    is printed. With 0 steps nothing is done, and nothing is slower.
    """
    if not steps:
        yield lambda row: None
        return
    found = Profile()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=kinds,
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
        on_trace_ready=lambda done: write(done, found, folder, device, console, say),
        acc_events=True,
    )

    def note(row: Row) -> None:
        if row["kind"] != "train":
            return
        found.seen += 1
        if WAIT + WARMUP < found.seen <= WAIT + WARMUP + steps:
            found.recorded[int(str(row["step"]))] = float(str(row["dt_ms"]))
        profiler.step()

    with profiler:
        yield note
    if not found.recorded:
        say(f"nothing was profiled: the profile begins with the {WAIT + WARMUP + 1}th update, there were {found.seen}")


def write(
    profiler: torch.profiler.profile,
    found: Profile,
    folder: Path,
    device: torch.device,
    console: Console,
    say: Callable[[str], None],
) -> None:
    """The trace and the costs of what was recorded."""
    if not found.recorded:
        return
    report = summarize(profiler.key_averages(), found.recorded, device)
    say(heading(report))
    print_table(costs_table(report), console)
    try:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        (folder / "costs.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        with (folder / "costs.txt").open("w", encoding="utf-8") as file:
            file.write(heading(report) + "\n")
            print_table(costs_table(report), PlainConsole(file=file))
    except (OSError, RuntimeError) as error:  # the profiler's own writer raises RuntimeError
        say(f"the profile cannot be written to {str(folder)!r} ({error}); the run goes on without it")
    else:
        say(f"profile of steps {min(found.recorded)} to {max(found.recorded)} written to {folder}")


def summarize(averages: Any, recorded: dict[int, float], device: torch.device) -> dict[str, Any]:
    """Milliseconds a step: of the whole step, of all work on the device, of its largest parts.

    On a GPU the parts are kernels and copies, which may run at the same time on several streams; on a CPU they are
    operations, without what they call.
    """
    on_gpu, n = device.type == "cuda", len(recorded)
    parts: list[dict[str, Any]] = []
    for event in averages:
        if event.key.startswith("ProfilerStep") or getattr(event, "is_user_annotation", False):
            continue
        if on_gpu != (event.device_type.name == "CUDA"):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts.append({"name": event.key, "calls": event.count / n, "ms": us / 1e3 / n})
    parts.sort(key=lambda part: -part["ms"])
    total = sum(part["ms"] for part in parts)
    for part in parts:
        part["share"] = part["ms"] / total if total else 0.0
    return {
        "device": device.type,
        "steps": sorted(recorded),
        "step_ms": sum(recorded.values()) / n,
        "work_ms": total,
        "costs": parts[:LARGEST],
    }


def heading(report: dict[str, Any]) -> str:
    what = "kernels" if report["device"] == "cuda" else "operations"
    return f"a step of {report['step_ms']:.1f} ms (profiled), {report['work_ms']:.1f} ms in {what}; the largest:"


def costs_table(report: dict[str, Any]) -> Table:
    """The largest costs."""
    table = Table()
    table.add_column("what")
    for name in ("calls a step", "ms a step", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in report["costs"]:
        table.add_row(part["name"], f"{part['calls']:,.0f}", f"{part['ms']:.3f}", f"{part['share']:.1%}")
    return table
