"""`--profile`: a trace and the largest costs of some steps, and nothing at all without it."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.cli.train import main
from regpt.errors import UsageError
from regpt.runs.pretrain import pretrain, resume
from regpt.runs.profile import LARGEST, heading, summarize

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture(scope="module")
def profiled_run(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("profiled") / "run"
    assert pretrain(tiny.run_config(shards), run, profile_steps=2) == 0
    return run


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile" / "costs.json").read_text(encoding="utf-8"))


def test_the_trace_is_chromes_and_holds_the_steps(profiled_run: Path):
    with gzip.open(profiled_run / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert "aten::addmm" in names
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}


def test_the_ten_largest_costs_are_kept_largest_first(profiled_run: Path):
    report = report_of(profiled_run)
    assert report["steps"] == [4, 5]
    costs = report["costs"]
    assert len(costs) == LARGEST
    assert [cost["ms"] for cost in costs] == sorted((cost["ms"] for cost in costs), reverse=True)
    assert all(cost["ms"] > 0 and cost["calls"] > 0 for cost in costs)
    assert sum(cost["share"] for cost in costs) <= 1
    assert any(cost["name"].startswith("aten::") for cost in costs)
    text = (profiled_run / "profile" / "costs.txt").read_text(encoding="utf-8")
    assert all(cost["name"] in text for cost in costs)


def test_the_table_is_printed_and_training_is_the_same(shards, profiled_run, tmp_path, capsys):
    run = tmp_path / "plain"
    assert pretrain(tiny.run_config(shards), run) == 0
    assert not (run / "profile").exists()
    assert "the largest" not in capsys.readouterr().out
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint_folder(folder, 8) / name).read_bytes() for folder in (profiled_run, run))
        assert ours == theirs
    config = tiny.change(tiny.run_config(shards), "train", steps=9)
    assert pretrain(config, tmp_path / "shown", profile_steps=1) == 0
    shown = capsys.readouterr().out
    assert "operations; the largest:" in shown
    assert "profile of steps 4 to 4 written to" in shown


def test_without_it_torchs_profiler_is_not_touched(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", None)
    assert pretrain(tiny.run_config(shards), tmp_path / "run") == 0


def test_a_run_too_short_says_so(shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny.change(tiny.run_config(shards), "train", steps=3), run, profile_steps=2) == 0
    assert "nothing was profiled: the profile begins with the 4th update, there were 3" in capsys.readouterr().out
    assert not (run / "profile").exists()


def test_a_run_that_ends_in_the_middle_keeps_what_was_recorded(shards, tmp_path):
    run = tmp_path / "run"
    assert pretrain(tiny.change(tiny.run_config(shards), "train", steps=5), run, profile_steps=10) == 0
    assert report_of(run)["steps"] == [4, 5]


def test_a_resumed_run_can_be_profiled(shards, tmp_path):
    run = tmp_path / "run"
    assert pretrain(tiny.run_config(shards), run) == 0
    for step in (4, 6, 8):
        shutil.rmtree(checkpoint_folder(run, step))
    assert resume(run, profile_steps=1) == 0
    assert report_of(run)["steps"] == [6]


def test_the_flag_reaches_the_run(shards, tmp_path, monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(
        "regpt.runs.pretrain.pretrain", lambda *args, profile_steps, **options: given.append(profile_steps) or 0
    )
    (tmp_path / "x.toml").write_text(tiny.run_config(shards).to_toml(), encoding="utf-8")
    assert main([str(tmp_path / "x.toml"), "--out", str(tmp_path / "run"), "--profile", "3"]) == 0
    assert given == [3]
    with pytest.raises(UsageError, match="--profile is -1, must be 0 or more"):
        main([str(tmp_path / "x.toml"), "--out", str(tmp_path / "run"), "--profile", "-1"])


def test_on_a_gpu_kernels_count_and_not_what_launches_them():
    def event(key: str, device: Any, ms: float, count: int = 4) -> SimpleNamespace:
        us = ms * 1e3
        return SimpleNamespace(
            key=key, device_type=device, count=count, self_device_time_total=us, self_cpu_time_total=us
        )

    averages = [
        event("ProfilerStep#4", CUDA, 100),
        event("aten::mm", CPU, 50),
        event("gemm_kernel", CUDA, 30),
        event("gelu_kernel", CUDA, 10, count=2),
    ]
    report = summarize(averages, {4: 25.0, 5: 27.0}, torch.device("cuda"))
    assert report["costs"] == [
        {"name": "gemm_kernel", "calls": 2.0, "ms": 15.0, "share": 0.75},
        {"name": "gelu_kernel", "calls": 1.0, "ms": 5.0, "share": 0.25},
    ]
    assert (report["step_ms"], report["work_ms"]) == (26.0, 20.0)
    assert "20.0 ms in kernels" in heading(report)


@pytest.mark.gpu
def test_a_real_gpus_kernels_are_found(shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "train", device="cuda")
    assert pretrain(config, tmp_path / "run", profile_steps=2) == 0
    report = report_of(tmp_path / "run")
    assert report["device"] == "cuda"
    assert len(report["costs"]) == LARGEST
    assert not any(cost["name"].startswith("aten::") for cost in report["costs"])
