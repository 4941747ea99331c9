"""`regpt train --profile N`: the time of N steps as a Chrome trace and torch's table of the largest costs."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from regpt.train.trainer import Row

WAIT, WARMUP = 2, 1  # steps before the profiled ones: compilation and first allocations; torch's own preparation
LARGEST = 10


@contextlib.contextmanager
def profiled(
    steps: int, folder: Path, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[Row], None]]:
    """A function to be called with every row of metrics; after `WAIT + WARMUP` updates, `steps` are recorded.

    `folder` then holds `trace.json.gz` (chrome://tracing, ui.perfetto.dev) and `costs.txt`, which is printed too.
    With 0 steps the profiler is not touched, and nothing is slower.
    """
    if not steps:
        yield lambda row: None
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    recorded: list[int] = []
    profiler = torch.profiler.profile(
        activities=kinds,
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
        on_trace_ready=lambda done: write(done, recorded, folder, device, say),
        acc_events=True,
    )
    seen = 0

    def note(row: Row) -> None:
        nonlocal seen
        if row["kind"] != "train":
            return
        seen += 1
        if WAIT + WARMUP < seen <= WAIT + WARMUP + steps:
            recorded.append(int(str(row["step"])))
        profiler.step()

    with profiler:
        yield note
    if not recorded:
        say(f"nothing was profiled: the profile begins with the {WAIT + WARMUP + 1}th update, there were {seen}")


def write(
    profiler: torch.profiler.profile,
    recorded: list[int],
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Write the trace and the costs of the `recorded` steps: of kernels on a GPU, of operations without their callees
    on a CPU."""
    if not recorded:
        return
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=LARGEST)
    steps = f"steps {recorded[0]} to {recorded[-1]}"
    say(f"the largest costs of {steps}, all together:\n{table}")
    try:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        (folder / "costs.txt").write_text(table, encoding="utf-8")
    except (OSError, RuntimeError) as error:  # the profiler's own writer raises RuntimeError
        say(f"the profile cannot be written to {str(folder)!r} ({error}); the run continues without it")
    else:
        say(f"profile of {steps} written to {folder}")
