"""How fast batches are made, and how soon the first one of ten million documents is there.

    python benchmarks/loader.py [--data DIR] [--tokens 100000000] [--documents 10000000] [--folder DIR]

Prints two tables and writes benchmarks/results/loader-<hardware>-<date>.json. The text is invented: only its lengths
matter. Each measurement runs in a process of its own; beside the clock stands the processor's time, which other
programs on the machine change less. Memory is what NumPy and Python take, not the mapped files, which the system keeps
and takes back as it likes. Files lie in --folder (a temporary one by default), about a gigabyte. With --data it times
the batches of that folder of token shards only.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from regpt.data.bos import PackedRows
from regpt.data.config import ShuffleRows
from regpt.data.loader import Loader
from regpt.data.manifest import read_manifest
from regpt.data.prefetch import Prefetcher
from regpt.data.rows import open_rows
from regpt.tools.bench.data import invent_shards, invented_lengths

SEQ_LEN, BATCH_TOKENS, MICRO_BATCH_ROWS = 1024, 524288, 64  # the lecture's run
VOCAB = 50257
SEED = 1337
WARMUP = 2  # steps: the first ones bring the file into memory and make the epoch's table
ORDERS = ("shuffle/epoch", "shuffle/65536", "shuffle/none", "sequential/none", "bos/epoch", "bos/none")
KINDS = {"long": 1000, "short": 20}  # mean tokens a document; lengths spread as web text's


@dataclass(frozen=True)
class Args:
    data: str = ""
    """Folder of token shards whose batches are timed, instead of invented ones."""
    tokens: int = 100_000_000
    """Tokens of the corpus whose batches are timed."""
    documents: int = 10_000_000
    """Documents of the corpus whose first batch is timed."""
    folder: str = ""
    """Where to write the corpora; default: a temporary folder."""
    measure: str = ""
    """One measurement, as JSON on standard output (how the script calls itself)."""


def main(args: Args) -> None:
    if args.measure:
        print(json.dumps(MEASUREMENTS[args.measure.split(":")[0]](*args.measure.split(":")[1:])))
        return
    with tempfile.TemporaryDirectory(dir=args.folder or None) as base:
        results = {
            "machine": machine(),
            "tokens": args.tokens,
            "documents": args.documents,
            "throughput": throughput_table(Path(base), args.tokens, args.data),
            "first_batch": [] if args.data else first_batch_table(Path(base), args.documents),
        }
    path = Path(__file__).parent / "results" / f"loader-{machine()['name']}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")


def throughput_table(base: Path, tokens: int, data: str) -> list[dict]:
    print(f"one process, batches of {BATCH_TOKENS:,} tokens in rows of {SEQ_LEN}; load {machine()['load']}")
    print(f"{'documents':>10} {'order':>15} {'mask':>5} {'Mtokens/s':>10} {'a CPU second':>13} {'cold':>6}  left out")
    rows = []
    for kind, mean in {"own": 0}.items() if data else KINDS.items():
        folder = Path(data) if data else base / kind
        if not data:
            invent_shards(folder, invented_lengths(tokens // mean, mean), VOCAB)
        for order in ORDERS:
            for mask in (False, True):
                row = {"kind": kind, "order": order, "mask": mask} | measured("throughput", folder, order, int(mask))
                row |= {} if mask else measured("cold", folder, order)
                cold = f"{row.get('cold_mtokens_per_s', math.nan):6.1f}"
                left_out = "" if row["left_out"] is None else f"{row['left_out']:8.1%}"
                speeds = f"{row['mtokens_per_s']:10.1f} {row['mtokens_per_cpu_s']:13.1f}"
                print(f"{kind:>10} {order:>15} {'yes' if mask else 'no':>5} {speeds} {cold}  {left_out}")
                rows.append(row)
    return rows


def first_batch_table(base: Path, documents: int) -> list[dict]:
    print(f"\n{documents:,} documents: seconds from opening the folder to the batch, extra memory at its peak")
    print(f"{'documents':>10} {'order':>15} {'step':>10} {'seconds':>8} {'CPU s':>6} {'MB':>6}")
    rows = []
    for kind, mean in KINDS.items():
        folder = base / f"{kind}-many"
        tokens = invent_shards(folder, invented_lengths(documents, mean), VOCAB, one_text=True)
        for order in ORDERS:
            for share in (0.0, 0.5):  # a fresh run, and one that goes on in the middle of the epoch
                step = int(share * tokens * (0.6 if order.startswith("bos") else 1) / BATCH_TOKENS)
                row = {"kind": kind, "order": order, "step": step} | measured("first", folder, order, step)
                row |= measured("memory", folder, order, step)
                numbers = f"{row['seconds']:8.2f} {row['cpu_s']:6.2f} {row['extra_mb']:6.0f}"
                print(f"{kind:>10} {order:>15} {step:>10,} {numbers}")
                rows.append(row)
    return rows


@dataclass(frozen=True)
class BatchReading:
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
            pin_memory=torch.cuda.is_available(),  # page-locked: a GPU copies from there
        )


def time_first_batch(reading: BatchReading, step: int = 0) -> dict[str, float]:
    """Seconds, by the clock and of the processor, from opening the folder to having the batches of `step`."""
    started, cpu = time.perf_counter(), time.process_time()
    reading.loader().step(step)
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def time_batches(reading: BatchReading, seconds: float) -> dict[str, Any]:
    """Steps of the loader with its prefetcher, as in a run, for about `seconds` after the first two.

    Returns steps and tokens a second, tokens for each second of the processor (which other programs on the machine
    change less), and the share of the tokens that the order `bos` drops.
    """
    loader = reading.loader()
    with Prefetcher(loader) as batches:
        for step in range(WARMUP):
            batches.step(step)
        step, started, cpu = WARMUP, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - started) < seconds or step == WARMUP:
            batches.step(step)
            step += 1
        cpu = time.process_time() - cpu
    steps = step - WARMUP
    tokens = steps * reading.batch_tokens
    return {
        "steps": steps,
        "steps_per_s": steps / passed,
        "tokens_per_s": tokens / passed,
        "tokens_per_cpu_s": tokens / cpu,
        "left_out": loader.rows.left_out() if isinstance(loader.rows, PackedRows) else None,
    }


def measured(*what: object) -> dict:
    command = [sys.executable, __file__, "--measure", ":".join(map(str, what))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_throughput(folder: str, order: str, mask: str) -> dict:
    """Steps of the loader with the prefetcher, for three seconds after the first two."""
    times = time_batches(reading(folder, order, mask == "1"), seconds=3)
    millions = {f"m{name}": times[name] / 1e6 for name in ("tokens_per_s", "tokens_per_cpu_s")}
    return millions | {"left_out": times["left_out"]}


def measure_first(folder: str, order: str, step: str) -> dict:
    return time_first_batch(reading(folder, order), int(step))


def measure_memory(folder: str, order: str, step: str) -> dict:
    tracemalloc.start()
    reading(folder, order).loader().step(int(step))
    return {"extra_mb": tracemalloc.get_traced_memory()[1] / 1e6}


def measure_cold(folder: str, order: str) -> dict:
    """One third of an epoch, its shards evicted from the page cache before (as far as the system allows)."""
    for shard in Path(folder).glob("*.bin"):
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loader = reading(folder, order).loader()
    steps = loader.rows.epoch_rows(1 << 62) // loader.batch_rows // 3
    started = time.perf_counter()
    with Prefetcher(loader, steps=steps) as batches:
        for step in range(steps):
            batches.step(step)
    return {"cold_mtokens_per_s": steps * BATCH_TOKENS / 1e6 / (time.perf_counter() - started)}


MEASUREMENTS = {
    "throughput": measure_throughput,
    "cold": measure_cold,
    "first": measure_first,
    "memory": measure_memory,
}


def reading(folder: str, order: str, mask: bool = False) -> BatchReading:
    order, _, shuffle_rows = order.partition("/")
    rows = int(shuffle_rows) if shuffle_rows.isdigit() else shuffle_rows
    return BatchReading(Path(folder), order, rows, mask, SEED, SEQ_LEN, BATCH_TOKENS, MICRO_BATCH_ROWS)


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = (gpu or f"{platform.machine()}-{cores}cores").replace(" ", "-").lower()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    return {"name": name, "gpu": gpu, "cores": cores, "load": load} | versions


if __name__ == "__main__":
    main(tyro.cli(Args))
