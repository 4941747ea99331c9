"""How fast one process makes batches from a data folder, and folders of invented tokens, for a speed that does not
depend on whose text is there."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regpt.data.bos import PackedRows
from regpt.data.config import ShuffleRows
from regpt.data.loader import Loader
from regpt.data.manifest import Manifest, Shard, read_manifest
from regpt.data.prefetch import Prefetcher
from regpt.data.rows import open_rows
from regpt.tools.bench.steps import library_versions

WARMUP = 2  # steps: the first ones bring the file into memory and make the epoch's table
SHARD_TOKENS = 100_000_000
MEAN_LENGTH = 1000  # tokens a document; web text's is about that (FineWeb-Edu: 10 billion in 9.7 million)
SPREAD = 1.0  # σ of the logarithm of the lengths, as in web text


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


def bench_data(
    reading: BatchReading, seconds: float, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report of `regpt bench data`."""
    first = time_first_batch(reading)
    return {
        "kind": "bench data",
        **asdict(reading),
        "folder": str(reading.folder),
        **time_batches(reading, seconds, progress),
        "first_step": first,
        "versions": library_versions(),
    }


def time_batches(
    reading: BatchReading, seconds: float, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
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
            progress(f"step {step}")
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


# ---- invented tokens -------------------------------------------------------------------------------------------------


def invented_lengths(documents: int, mean: int = MEAN_LENGTH) -> np.ndarray:
    """Log-normal lengths of `documents` documents, at least 2 tokens each, always the same."""
    rng = np.random.default_rng(0)
    return np.maximum(2, rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, documents)).astype(np.int64)


def invent_shards(folder: Path, lengths: np.ndarray, vocab_size: int, *, one_text: bool = False) -> int:
    """Write a folder of training shards with documents of these `lengths`; the number of tokens.

    Token ids are as frequent as Zipf's law has it (the probability of id k falls as 1/(k + 1)): what a step
    costs depends a little on how often the same embedding is read. The last id starts every document.

    Args:
        one_text: all shards of full size are one file, so that many of them fit on a disk and into the system's cache.
    """
    folder.mkdir()
    starts = np.cumsum(np.concatenate([[0], lengths]))
    total, eot = int(starts[-1]), vocab_size - 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    rng = np.random.default_rng(1)
    shards = []
    for number, begin in enumerate(range(0, total, SHARD_TOKENS)):
        end = min(total, begin + SHARD_TOKENS)
        local = starts[np.searchsorted(starts, begin) : np.searchsorted(starts[:-1], end)] - begin
        shard = Shard(f"train-{number:05d}.bin", "train", end - begin, len(local), "", "", continues=end not in starts)
        if one_text and number > 0 and shard.tokens == SHARD_TOKENS:
            os.link(folder / shards[0].file, folder / shard.file)
        else:
            tokens = zipf(rng, shard.tokens, eot).astype(dtype)
            tokens[local] = eot
            tokens.tofile(folder / shard.file)
        local.astype("<i8").tofile(folder / shard.idx_file)
        shards.append(shard)
    manifest = Manifest("invented", "", vocab_size, eot, dtype, tuple(shards))
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return total


def zipf(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """(count,) int32 from [0, n): the logarithm of k + 1 is about uniform, so that k has a share of about 1/(k + 1)."""
    drawn = np.exp(rng.random(count, dtype=np.float32) * np.float32(np.log(n + 1))).astype(np.int32) - 1
    return np.minimum(drawn, max(0, n - 1))  # float32 may round up to n
