"""A run that keeps an average of its weights: validated, stored, resumed, forked, and read on demand."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint
from regpt.checkpoint.open import open_model
from regpt.config import RunConfig
from regpt.errors import UsageError
from regpt.model.weights import state_tensors
from regpt.runs.pretrain import fork, pretrain, resume


@pytest.fixture(scope="module")
def config(shards) -> RunConfig:
    return tiny.change(tiny.run_config(shards), "train", ema_decay=0.9)


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """The run without a stop; read only."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(config, run) == 0
    return run


def test_validation_rows_carry_the_loss_of_the_average(straight):
    rows = tiny.rows_of(straight, "val")
    assert rows[0]["loss_ema"] == rows[0]["loss"]
    assert all(0 < row["bpb_ema"] < row["loss_ema"] for row in rows)
    assert rows[-1]["loss_ema"] != rows[-1]["loss"]


def test_the_rest_of_the_run_is_what_it_is_without(straight, config, tmp_path):
    assert pretrain(tiny.change(config, "train", ema_decay=0.0), tmp_path / "run") == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint_folder(run, 8) / name).read_bytes() for run in (straight, tmp_path / "run"))
        assert ours == theirs
    assert not (checkpoint_folder(tmp_path / "run", 8) / "ema.safetensors").exists()
    assert "loss_ema" not in tiny.rows_of(tmp_path / "run", "val")[0]


@pytest.mark.parametrize("step", [2, 6])
def test_resume_continues_the_average_bitwise(straight, tmp_path, step):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for later in range(step + 2, 9, 2):
        shutil.rmtree(checkpoint_folder(run, later))
    assert load_checkpoint(checkpoint_folder(run, step)).state.average_updates == step
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert tiny.rows_of(run, "val")[-1]["loss_ema"] == tiny.rows_of(straight, "val")[-1]["loss_ema"]


def test_a_fork_may_begin_an_average(config, tmp_path):
    plain = tiny.change(config, "train", ema_decay=0.0)
    assert pretrain(plain, tmp_path / "plain") == 0
    source = checkpoint_folder(tmp_path / "plain", 4)
    assert fork(config, source, tmp_path / "fork") == 0
    state = load_checkpoint(checkpoint_folder(tmp_path / "fork", 8)).state
    assert (state.step, state.average_updates) == (8, 4)
    first = load_file(checkpoint_folder(tmp_path / "fork", 4) / "ema.safetensors")
    assert all(tensor.equal(load_file(source / "model.safetensors")[name]) for name, tensor in first.items())


def test_the_average_is_opened_on_demand(straight):
    stored = load_file(checkpoint_folder(straight, 8) / "ema.safetensors")
    for name in (str(straight), str(checkpoint_folder(straight, 8))):
        opened = open_model(name, ema=True)
        assert opened.source.endswith("step-00000008, average")
        assert all(tensor.equal(stored[key]) for key, tensor in state_tensors(opened.model).items())
        assert not open_model(name).model.wte.weight.equal(opened.model.wte.weight)


def test_commands_read_it_and_agree_with_the_run(straight, tmp_path, capsys):
    assert main(["eval", str(straight), "--ema", "--val-tokens", "48", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["val"]["loss"]
    assert found == pytest.approx(tiny.rows_of(straight, "val")[-1]["loss_ema"], rel=1e-6)
    assert main(["sample", str(straight), "--ema", "--prompt", "ba", "-n", "1", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(straight), "--ema", "--out", str(tmp_path / "hf")]) == 0
    exported, stored = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_file(checkpoint_folder(straight, 8) / "ema.safetensors"),
    )
    assert exported["transformer.wte.weight"].equal(stored["wte.weight"])


def test_what_has_no_average_says_so(config, tmp_path, straight):
    assert pretrain(tiny.change(config, "train", ema_decay=0.0), tmp_path / "run") == 0
    with pytest.raises(UsageError, match=r"keeps no average of its weights; leave out --ema, or train with"):
        open_model(str(tmp_path / "run"), ema=True)
    assert main(["export", str(straight), "--out", str(tmp_path / "hf")]) == 0
    with pytest.raises(UsageError, match=r"is no run and no checkpoint, which alone have an average"):
        open_model(str(tmp_path / "hf"), ema=True)
