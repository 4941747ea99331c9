"""How fast one process makes batches from a data folder: reading, ordering and packing, no model."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from regpt.data.bos import PackedRows
from regpt.data.config import ShuffleRows
from regpt.data.loader import Loader
from regpt.data.manifest import read_manifest
from regpt.data.prefetch import Prefetcher
from regpt.data.rows import open_rows
from regpt.tools.bench.active import versions

WARMUP = 2  # steps: the first ones bring the file into memory and make the epoch's table


@dataclass(frozen=True)
class Reading:
    """What is read, and how; fields as in the configuration's `[data]` and `[train]`."""

    folder: Path
    order: str
    shuffle_rows: ShuffleRows
    document_mask: bool
    seed: int
    seq_len: int
    batch_tokens: int
    micro_batch_rows: int

    def loader(self) -> Loader:
        """Opened anew; raises what `open_rows` and `Loader` do."""
        manifest = read_manifest(self.folder)
        return Loader(
            open_rows(self.folder, manifest, "train", self.order, self.seed, self.seq_len, self.shuffle_rows),
            batch_tokens=self.batch_tokens,
            micro_batch_rows=self.micro_batch_rows,
            eot=manifest.eot if self.document_mask else None,
            pin_memory=pinned(),
        )


def pinned() -> bool:
    """Whether batches are made in page-locked memory, from which a GPU copies them."""
    return torch.cuda.is_available()


def time_first_batch(reading: Reading, step: int = 0) -> dict[str, float]:
    """Seconds, by the clock and of the processor, from opening the folder to having the batches of `step`."""
    started, cpu = time.perf_counter(), time.process_time()
    reading.loader().step(step)
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def bench_data(reading: Reading, seconds: float, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The report of `regpt bench data`."""
    first = time_first_batch(reading)
    times = time_batches(reading, seconds, progress)
    settings = asdict(reading) | {"folder": str(reading.folder)}
    return {"kind": "bench data", **settings, **times, "first_step": first, "pinned": pinned(), "versions": versions()}


def time_batches(
    reading: Reading, seconds: float, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Steps of the loader behind the prefetcher, as in a run, for about `seconds` after the first two.

    Returns steps and tokens a second, tokens for each second of the processor (which other programs on the machine
    change less), and the share of the tokens that the order `bos` leaves out.
    """
    loader = reading.loader()
    with Prefetcher(loader) as batches:
        for step in range(WARMUP):
            batches.step(step)
        step, started, cpu = WARMUP, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - started) < seconds or step == WARMUP:
            batches.step(step)
            step += 1
            progress(f"step {step}")
        cpu = time.process_time() - cpu
    steps = step - WARMUP
    tokens = steps * reading.batch_tokens
    rows = loader.rows
    return {
        "steps": steps,
        "steps_per_s": steps / passed,
        "tokens_per_s": tokens / passed,
        "tokens_per_cpu_s": tokens / cpu,
        "left_out": rows.left_out() if isinstance(rows, PackedRows) else None,
    }
