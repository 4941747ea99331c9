"""`regpt bench data`: the speed of a loader, on the folder and with the settings that were asked for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from regpt.data.bos import PackedRows
from regpt.tools.bench import data as batches_module
from regpt.tools.bench.data import BatchReading, time_batches

SMALL = ("--seq-len", 16, "--batch-tokens", 128, "--micro-batch-rows", 4, "--seconds", 0.01)


def reading(folder: Path, order: str = "shuffle", *, mask: bool = False) -> BatchReading:
    return BatchReading(folder, order, "epoch", mask, 1337, seq_len=16, batch_tokens=128, micro_batch_rows=4)


def test_the_report_is_of_what_was_asked_for(bench, shards: Path):
    code, out, err = bench("data", shards, *SMALL, "--order", "bos", "--document-mask", "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert (report["kind"], report["folder"], report["order"]) == ("bench data", str(shards), "bos")
    assert (report["document_mask"], report["batch_tokens"]) == (True, 128)
    assert report["tokens_per_s"] == pytest.approx(128 * report["steps_per_s"])
    assert 0 < report["left_out"] < 1
    assert report["first_step"]["seconds"] > 0


def test_the_table_shows_the_same(bench, shards: Path, tmp_path: Path):
    code, out, err = bench("data", shards, *SMALL, "--json", tmp_path / "data.json")
    assert code == 0, err
    report = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert f"{report['tokens_per_s']:,.0f}" in out
    assert report["left_out"] is None
    assert "left out" not in out


def test_the_loader_is_the_one_of_a_run(shards: Path):
    loader = reading(shards, "bos", mask=True).loader()
    assert isinstance(loader.rows, PackedRows)
    (first, *_), others = loader.step(0), loader.step(3)
    assert first.idx.shape == (4, 16)
    assert first.cu_seqlens is not None
    assert len(others) == 2
    assert reading(shards).loader().step(0)[0].cu_seqlens is None


def test_tokens_are_counted_over_the_timed_steps_only(shards: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(100))  # seconds: the clock is read once before, then once a step
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(ticks) / 2)
    monkeypatch.setattr(batches_module, "time", clock)
    times = time_batches(reading(shards), seconds=4)
    # perf 0, CPU 0.5, perf 2 (one step), 3 (one step), 4: past the four seconds; CPU 2.5
    assert (times["steps"], times["steps_per_s"], times["tokens_per_s"]) == (2, 0.5, 64)
    assert times["tokens_per_cpu_s"] == 128


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--seconds", "0"], 2, ["--seconds is 0", "above 0"]),
        (["--seconds", "nan"], 2, ["--seconds is nan"]),
        (["--seq-len", "0"], 2, ["--seq-len is 0", "at least 1"]),
        (["--batch-tokens", "100"], 2, ["100", "64"]),
        (["--order", "random"], 2, ["random", "bos"]),
        (["--json", "no/such/folder/x"], 1, ["no/such/folder/x"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_sentence(bench, shards: Path, flags, code: int, parts):
    got, _, err = bench("data", shards, *SMALL, *flags)
    assert got == code, err
    assert err.startswith("regpt: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_a_folder_that_is_not_there_is_named(bench):
    code, _, err = bench("data", "/no/such/folder")
    assert code == 1
    assert "'/no/such/folder' does not exist" in err
