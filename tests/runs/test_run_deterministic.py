"""`train.deterministic`: a run that was stopped goes on bitwise as the run that was not."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.checkpoint.state import read_state
from regpt.config import RunConfig
from regpt.errors import UserError
from regpt.kernels import select
from regpt.parallel.mesh import open_mesh
from regpt.parallel.repeatable import ENVIRONMENT
from regpt.runs.pretrain import pretrain, resume
from regpt.train.micro_batch import MicroBatch


@pytest.fixture(scope="module")
def config(shards) -> RunConfig:
    return tiny.change(tiny.run_config(shards), "train", deterministic=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the mode sets is gone after each test."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "gone")
        monkeypatch.delenv(name)


def in_one(config: RunConfig | None, run: Path) -> int:
    torch.manual_seed(os.getpid())  # nothing may come from the process
    return pretrain(config, run) if config is not None else resume(run)


def stopped_after(run: Path, copy: Path, step: int) -> Path:
    """`run` as it was when it had just saved after `step` updates."""
    shutil.copytree(run, copy)
    for folder in checkpoints(copy):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step), encoding="utf-8")
    return copy


def numbers(run: Path) -> dict[tuple, tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("loss", "grad_norm", "lr", "bpb", "stderr")
    return {(r["kind"], r["step"]): tuple(r.get(k) for k in keys) for r in rows if r["kind"] in ("train", "val")}


def files(run: Path) -> dict[str, bytes]:
    folder = checkpoint_folder(run, 8)
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_resumed_run_is_bitwise_the_straight_one(config, processes: int, tmp_path: Path):
    straight = tmp_path / "straight"
    assert tiny.in_processes(processes, in_one, config, straight) == [0] * processes
    stopped = stopped_after(straight, tmp_path / "stopped", 4)
    assert tiny.in_processes(processes, in_one, None, stopped) == [0] * processes
    assert numbers(stopped) == numbers(straight)
    assert files(stopped) == files(straight)


def test_on_another_number_of_processes_it_is_close_and_the_run_says_that_it_is_not_bitwise(config, tmp_path: Path):
    straight = tmp_path / "straight"
    assert pretrain(config, straight) == 0
    stopped = stopped_after(straight, tmp_path / "stopped", 4)
    assert tiny.in_processes(2, in_one, None, stopped) == [0, 0]
    rows = map(json.loads, (stopped / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    (said,) = [row["not_bitwise"] for row in rows if row.get("name") == "resume"]
    assert said == "not bitwise the run that was stopped, in spite of train.deterministic: world_size 1 → 2"
    assert numbers(stopped)["train", 8][0] == pytest.approx(numbers(straight)["train", 8][0], rel=1e-4)


def test_another_micro_batch_is_the_one_asked_for_and_said_not_to_be_bitwise(config, tmp_path: Path):
    """The checkpoint's own, smaller after a lack of memory, is for a run whose configuration stays what it is."""
    straight = tmp_path / "straight"
    assert pretrain(config, straight) == 0
    stopped, before = stopped_after(straight, tmp_path / "stopped", 4), config.train.first_rows
    assert resume(stopped, tiny.change(config, "train", micro_batch_rows=2 * before)) == 0
    rows = map(json.loads, (stopped / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    (said,) = [row["not_bitwise"] for row in rows if row.get("name") == "resume"]
    assert said.endswith(f"in spite of train.deterministic: train.micro_batch_rows {before} → {2 * before}")
    assert read_state(checkpoints(stopped)[-1] / "state.json").trainer["micro_batch_rows"] == 2 * before


def test_deterministic_algorithms_are_on_in_the_run_and_nowhere_else(config, tmp_path, monkeypatch):
    seen: list[bool] = []
    before = dict(os.environ)
    monkeypatch.setattr(tiny.Transformer, "hidden", recording(tiny.Transformer.hidden, seen))
    assert pretrain(tiny.change(config, "train", steps=1), tmp_path / "run") == 0
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before
    seen.clear()
    assert pretrain(tiny.change(config, "train", steps=1, deterministic=False), tmp_path / "other") == 0
    assert set(seen) == {False}


def recording(function, seen: list[bool]):
    def hidden(self, *args, **kwargs):
        environment = all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
        assert environment or not torch.are_deterministic_algorithms_enabled()
        seen.append(torch.are_deterministic_algorithms_enabled())
        return function(self, *args, **kwargs)

    return hidden


def test_the_environment_that_a_user_set_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with open_mesh("cpu", deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_number_of_threads_is_part_of_the_checkpoint(config, tmp_path: Path):
    run = tmp_path / "run"
    assert pretrain(config, run) == 0
    assert read_state(checkpoint_folder(run, 8) / "state.json").trainer["threads"] == 1
    torch.set_num_threads(2)
    try:
        assert resume(run) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_the_micro_batch_is_pinned():
    def compute(rows: int) -> int:
        if rows > 1:
            raise torch.OutOfMemoryError("out of memory")
        return rows

    assert MicroBatch(4, tiny.ALONE).attempt(compute) == 1
    with pytest.raises(UserError, match=r"micro_batch_rows = 4, which train\.deterministic pins; try --train"):
        MicroBatch(4, tiny.ALONE, pinned=True).attempt(compute)


def test_the_fused_kernels_give_way(config, monkeypatch):
    from regpt.runs.build import choose_kernels

    monkeypatch.setattr(select, "device_obstacle", lambda *args: None)
    family = replace(select.FAMILIES["gpt2"], obstacle=lambda *args: None)
    monkeypatch.setitem(select.FAMILIES, "gpt2", family)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = tiny.build_model(config=config.model, dtype=torch.float32)
    assert choose_kernels(config, model, torch.device("cuda")).name == "plain"
    assert (
        choose_kernels(tiny.change(config, "train", deterministic=False), model, torch.device("cuda")).name == "fused"
    )
