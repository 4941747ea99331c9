"""`benchmarks/loader.py`: the speed of a loader, on the folder and with the settings given."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from regpt.data.bos import PackedRows


def reading(script, folder: Path, order: str = "shuffle", *, mask: bool = False):
    return script.BatchReading(folder, order, "epoch", mask, 1337, seq_len=16, batch_tokens=128, micro_batch_rows=4)


def test_the_loader_is_the_one_of_a_run(loader_script, shards: Path):
    loader = reading(loader_script, shards, "bos", mask=True).loader()
    assert isinstance(loader.rows, PackedRows)
    (first, *_), others = loader.step(0), loader.step(3)
    assert first.idx.shape == (4, 16)
    assert first.cu_seqlens is not None
    assert len(others) == 2
    assert reading(loader_script, shards).loader().step(0)[0].cu_seqlens is None


def test_tokens_are_counted_over_the_timed_steps_only(loader_script, shards: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(100))  # seconds: the clock is read once before, then once a step
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(ticks) / 2)
    monkeypatch.setattr(loader_script, "time", clock)
    times = loader_script.time_batches(reading(loader_script, shards), seconds=4)
    # perf 0, CPU 0.5, perf 2 (one step), 3 (one step), 4: past the four seconds; CPU 2.5
    assert (times["steps"], times["steps_per_s"], times["tokens_per_s"]) == (2, 0.5, 64)
    assert times["tokens_per_cpu_s"] == 128
