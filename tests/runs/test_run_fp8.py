"""Whole runs with `train.precision` fp8: validation, checkpoints, going on, and what refuses it."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.config import RunConfig
from regpt.errors import UsageError
from regpt.kernels import fp8
from regpt.parallel.repeatable import ENVIRONMENT
from regpt.runs.folder import read_run_config
from regpt.runs.pretrain import pretrain, resume


@pytest.fixture
def config(shards) -> RunConfig:
    return tiny.change(tiny.run_config(shards), "train", precision="fp8")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the deterministic mode sets is gone after each test."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "gone")
        monkeypatch.delenv(name)


def losses(run: Path, kind: str) -> list[float]:
    return [row["loss"] for row in tiny.rows_of(run, kind)]


def test_a_run_has_nearly_the_losses_of_bf16_and_bitwise_its_first_validation(config: RunConfig, tmp_path: Path):
    for precision in ("fp8", "bf16"):
        assert pretrain(tiny.change(config, "train", precision=precision), tmp_path / precision) == 0
    (first, *ours), (same, *theirs) = (losses(tmp_path / name, "val") for name in ("fp8", "bf16"))
    assert first == same
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert ours != theirs
    assert losses(tmp_path / "fp8", "train") == pytest.approx(losses(tmp_path / "bf16", "train"), rel=5e-3)


def test_a_stopped_run_goes_on_bitwise_in_the_deterministic_mode(config: RunConfig, tmp_path: Path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert pretrain(tiny.change(config, "train", deterministic=True, activation_checkpointing=True), straight) == 0
    shutil.copytree(straight, cut)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(cut, later))
    torch.manual_seed(os.getpid())
    assert resume(cut) == 0
    assert tiny.final_files(cut) == tiny.final_files(straight)
    assert losses(cut, "train")[-4:] == losses(straight, "train")[-4:]


def test_another_precision_is_another_run(config: RunConfig, tmp_path: Path):
    run = tmp_path / "run"
    assert pretrain(config, run) == 0
    with pytest.raises(UsageError, match=r"another run: train\.precision fp8 → bf16"):
        resume(run, tiny.change(read_run_config(run), "train", precision="bf16"))


def test_documents_are_masked_as_under_bf16(config: RunConfig, tmp_path: Path):
    config = tiny.change(config, "data", document_mask=True)
    for precision in ("fp8", "bf16"):
        assert pretrain(tiny.change(config, "train", precision=precision), tmp_path / precision) == 0
    ours, theirs = (losses(tmp_path / name, "train") for name in ("fp8", "bf16"))
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_a_device_that_cannot_is_refused_before_anything_is_written(config: RunConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fp8, "obstacle", lambda device: f"FP8 cannot be had on {device.type}")
    with pytest.raises(UsageError, match=r"train\.precision is fp8, but FP8 cannot be had on cpu; set"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
