"""`--profile`: a trace and the largest costs of some steps, and nothing at all without it."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.cli.train import main
from regpt.errors import UsageError
from regpt.runs.pretrain import pretrain, resume


@pytest.fixture(scope="module")
def profiled_run(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("profiled") / "run"
    assert pretrain(tiny.run_config(shards), run, profile_steps=2) == 0
    return run


def events_of(run: Path) -> list[dict[str, Any]]:
    with gzip.open(run / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_of(run: Path) -> set[str]:
    return {event["name"] for event in events_of(run) if event["name"].startswith("ProfilerStep")}


def test_the_trace_is_chromes_and_holds_the_steps(profiled_run: Path):
    assert any(event["name"] == "aten::addmm" for event in events_of(profiled_run))
    assert steps_of(profiled_run) == {"ProfilerStep#3", "ProfilerStep#4"}


def test_the_ten_largest_costs_are_kept_largest_first(profiled_run: Path):
    text = (profiled_run / "profile" / "costs.txt").read_text(encoding="utf-8")
    shares = [float(share) for share in re.findall(r"^.*? ([\d.]+)%", text, flags=re.M)]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert "aten::" in text


def test_the_table_is_printed_and_training_is_the_same(shards, profiled_run, tmp_path, capsys):
    run = tmp_path / "plain"
    assert pretrain(tiny.run_config(shards), run) == 0
    assert not (run / "profile").exists()
    assert "the largest costs" not in capsys.readouterr().out
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint_folder(folder, 8) / name).read_bytes() for folder in (profiled_run, run))
        assert ours == theirs
    config = tiny.change(tiny.run_config(shards), "train", steps=9)
    assert pretrain(config, tmp_path / "shown", profile_steps=1) == 0
    shown = capsys.readouterr().out
    assert "the largest costs of steps 4 to 4" in shown
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
    assert steps_of(run) >= {"ProfilerStep#3", "ProfilerStep#4"}


def test_a_resumed_run_can_be_profiled(shards, tmp_path):
    run = tmp_path / "run"
    assert pretrain(tiny.run_config(shards), run) == 0
    for step in (4, 6, 8):
        shutil.rmtree(checkpoint_folder(run, step))
    assert resume(run, profile_steps=1) == 0
    assert steps_of(run) == {"ProfilerStep#3"}


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


@pytest.mark.gpu
def test_a_real_gpus_kernels_are_found(shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "train", device="cuda")
    assert pretrain(config, tmp_path / "run", profile_steps=2) == 0
    assert any(event.get("cat") == "kernel" for event in events_of(tmp_path / "run"))
    assert "CUDA" in (tmp_path / "run" / "profile" / "costs.txt").read_text(encoding="utf-8")
