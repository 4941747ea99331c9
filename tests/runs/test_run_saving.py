"""Checkpoints of a run: what they cost is written down, and a disk that cannot take them loses nothing."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import regpt.tensors
import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint
from regpt.errors import UserError
from regpt.parallel.signals import EXIT_SAVED
from regpt.runs.pretrain import pretrain, resume


def steps(run: Path) -> list[int]:
    return [load_checkpoint(folder).step for folder in checkpoints(run)]


def test_every_checkpoint_has_a_row_that_says_how_long_training_waited(straight):
    rows = [row for row in tiny.rows_of(straight, "event") if row["name"] == "checkpoint"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8] == steps(straight)
    for row in rows:
        assert row["stall_ms"] > 0
        assert row["write_ms"] > 0
        files = checkpoint_folder(straight, row["step"]).glob("*.safetensors")
        assert row["bytes"] == sum(t.nbytes for file in files for t in regpt.tensors.TensorFiles([file]).values())


def test_the_state_says_where_the_run_stands(straight, config):
    state = load_checkpoint(checkpoint_folder(straight, 4)).state
    assert state.step == 4
    assert state.data.next_row == 4 * 64 // 16
    assert (state.data.order, state.data.seed) == (config.data.order, config.data.seed)
    env = json.loads((straight / "env.json").read_text(encoding="utf-8"))
    assert state.data.manifest_sha256 == env["data"]["manifest_sha256"]
    row = tiny.rows_of(straight, "train")[3]
    assert state.schedule == {"name": "cosine", "steps": 8, "lr": row["lr"]}
    assert state.config["model"]["n_embd"] == 16
    assert state.made_with["torch"] == torch.__version__
    assert [sorted(states) for states in state.random] == [["cpu", "numpy", "python"]]


def test_global_generators_go_on_where_they_were(config, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    drawn = []
    states = load_checkpoint(checkpoint_folder(run, 8)).state.random[0]
    for _ in range(2):
        assert resume(run) == 0
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    assert set(states) == {"cpu", "numpy", "python"}


@pytest.fixture
def disk(monkeypatch) -> list[int]:
    """Its one element counts the files of tensors that can still be written."""
    room, real = [1000], regpt.tensors.write_tensors

    def write(path, tensors):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    monkeypatch.setattr(regpt.tensors, "write_tensors", write)
    return room


def test_a_full_disk_stops_the_run_in_one_sentence_and_the_rest_is_bitwise_the_same(config, straight, tmp_path, disk):
    run = tmp_path / "run"
    disk[0] = 3  # the second checkpoint fails half-way, and so does every later one
    with pytest.raises(UserError, match=r"cannot write .*No space left.*free some space.*untouched"):
        pretrain(config, run)
    assert steps(run) == [2]
    assert tiny.rows_of(run, "train")[-1]["step"] < 8  # it did not train on without saving
    disk[0] = 1000
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)


@pytest.mark.parametrize("fails", [2, 3])
def test_a_disk_that_was_full_for_a_moment_costs_a_stop_and_no_step(
    config, straight, tmp_path, monkeypatch, capsys, fails
):
    run, calls, real = tmp_path / "run", [], regpt.tensors.write_tensors

    def write(path, tensors):
        calls.append(path)
        if len(calls) == fails + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    monkeypatch.setattr(regpt.tensors, "write_tensors", write)
    assert pretrain(config, run) == EXIT_SAVED
    last = tiny.rows_of(run, "train")[-1]["step"]
    assert steps(run)[-1] == last >= 4  # the state at the stop, not the one that could not be written
    assert "No space left on device" in capsys.readouterr().out.replace("\n", " ")
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)


def test_metrics_that_cannot_be_written_are_one_sentence(config, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl.*make the place writable.*--resume"):
        resume(run)


def test_a_run_without_background_saves_the_same(config, straight, tmp_path):
    assert pretrain(tiny.change(config, "checkpoint", background=False), tmp_path / "run") == 0
    assert tiny.final_files(tmp_path / "run") == tiny.final_files(straight)
    assert steps(tmp_path / "run") == [2, 4, 6, 8]


def test_a_run_without_a_checkpoint_begins_again_and_says_so(straight: Path, tmp_path: Path, capfd):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints")
    assert resume(run) == 0
    assert f"{run} has no checkpoint to continue from: the run begins again, with step 1" in "".join(capfd.readouterr())
    assert steps(run)[-1] == steps(straight)[-1]
