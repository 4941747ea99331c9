"""A step of a run once more: the numbers of the run, what it was made of, and what broke it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.manifest import write_manifest
from regpt.errors import UsageError, UserError
from regpt.model.gpt2 import CausalSelfAttention
from regpt.runs.pretrain import pretrain
from regpt.runs.replay import replay


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of eight steps; read only."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    assert pretrain(tiny.run_config(shards), folder) == 0
    return folder


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("step", "origin"), [(1, 0), (2, 0), (3, 2), (6, 4), (8, 6)])
def test_the_step_has_the_loss_and_norm_that_the_run_wrote(run: Path, step: int, origin: int):
    before = contents(run)
    found = replay(run, step)
    assert found["from_step"] == origin
    assert {key: found[key] for key in ("loss", "grad_norm", "lr")} == found["recorded"]
    assert found["finite"]
    assert contents(run) == before


def test_the_documents_losses_make_up_the_loss(run: Path):
    found = replay(run, 5)
    assert found["rows"] == [16, 19]
    assert {d["row"] for d in found["documents"]} == {16, 17, 18, 19}
    # The first token of a row has no loss of its own.
    firsts = {
        row: min((d for d in found["documents"] if d["row"] == row), key=lambda d: d["place"]) for row in range(16, 20)
    }
    weight = {id(d): d["tokens"] - (d is firsts[d["row"]]) for d in found["documents"]}
    assert sum(weight.values()) == 64
    total = sum(d["loss"] * weight[id(d)] for d in found["documents"] if d["loss"] is not None)
    assert total / 64 == pytest.approx(found["loss"], rel=1e-5)
    losses = [d["loss"] for d in found["documents"] if d["loss"] is not None]
    assert losses == sorted(losses, reverse=True)
    assert all(d["text"] for d in found["documents"])


def test_the_first_module_that_is_not_finite_is_found(run: Path, monkeypatch):
    assert replay(run, 4, op_level=True)["first_not_finite"] is None
    attend = CausalSelfAttention.forward

    def spoiled(self, x, *args):
        y = attend(self, x, *args)
        return y.index_fill(1, torch.tensor([3]), math.nan)

    monkeypatch.setattr(CausalSelfAttention, "forward", spoiled)
    found = replay(run, 1, op_level=True)
    assert found["first_not_finite"] == {
        "row": 0,
        "module": "h.0.attn",
        "kind": "CausalSelfAttention",
        "inputs_finite": True,
    }
    assert found["loss"] == "nan"
    assert not found["finite"]
    assert found["spoiled_weight"] is None
    assert found["spoiled_gradient"] == "wte.weight"


def test_a_step_that_the_run_refused_is_compared_with_its_event(shards, tmp_path: Path):
    config = tiny.change(tiny.run_config(shards), "optim", lr=1e30, warmup_steps=0, schedule="constant")
    assert main_of(config, tmp_path) == 1
    found = replay(tmp_path / "run", 2)
    assert found["loss"] == found["recorded"]["loss"] == "nan"


def main_of(config, folder: Path) -> int:
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return main(["train", str(folder / "config.toml"), "--out", str(folder / "run")])


def test_a_damaged_checkpoint_is_passed_over(run: Path, tmp_path: Path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (checkpoint_folder(copy, 4) / "model.safetensors").write_bytes(b"")
    found = replay(copy, 6)
    assert found["from_step"] == 2
    assert found["loss"] == found["recorded"]["loss"]
    assert "skipped step-00000004" in capsys.readouterr().err


def test_a_checkpoint_changed_behind_our_back_is_seen_in_the_numbers(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    folder = checkpoint_folder(copy, 4)
    weights = load_file(folder / "model.safetensors")
    weights["wte.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    found = replay(copy, 5)
    assert found["loss"] != found["recorded"]["loss"]


@pytest.mark.parametrize("step", [0, 9])
def test_a_step_that_is_none_is_refused(run: Path, step: int):
    with pytest.raises(UsageError, match=rf"--step is {step}, must be from 1 to the 8"):
        replay(run, step)


def test_the_command_says_it_in_words_and_in_json(run: Path, capsys):
    assert main(["replay", str(run), "--step", "5", "-n", "2", "--op-level"]) == 0
    out = capsys.readouterr().out
    assert "step 5, from the checkpoint of step 4: loss " in out
    assert ": the same" in out
    assert "every module's output is finite" in out
    assert out.count("  document ") == 2
    assert main(["replay", str(run), "--step", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5


def test_rows_that_are_no_rows_do_not_hide_the_others(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "run")
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00 no text\n[1]\n{\n")
    assert replay(copy, 5)["recorded"] == replay(run, 5)["recorded"] is not None


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_whose_data_moved_is_replayed_from_their_new_place(run: Path, shards: Path, tmp_path: Path, capsys, step):
    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copy)
    shutil.copytree(shards, moved)
    for file in (*copy.rglob("config.toml"), *copy.rglob("state.json")):
        file.write_text(file.read_text("utf-8").replace(str(shards), str(tmp_path / "gone")), encoding="utf-8")
    for folder in (copy / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
        write_manifest(folder)
    command = ["replay", str(copy), "--step", str(step)]
    assert main(command) == 1
    assert "eval and replay: --data DIR" in capsys.readouterr().err
    assert main([*command, "--data", str(moved)]) == 0
    assert ": the same\n" in capsys.readouterr().out
    (moved / "manifest.json").write_text((moved / "manifest.json").read_text("utf-8") + "\n", encoding="utf-8")
    assert main([*command, "--data", str(moved)]) == 1
    assert "are not those that" in capsys.readouterr().err


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Path:
    """The run, gone on from step 4 with twice the batch."""
    copy = shutil.copytree(run, tmp_path / "changed")
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(copy, later), ignore_errors=True)
    assert main(["train", "--resume", str(copy), "--force", "--train.batch-tokens", "128", "--optim.lr", "0.02"]) == 0
    return copy


@pytest.mark.parametrize(("step", "gone", "origin"), [(3, (), 2), (4, (4, 6), 2), (5, (), 4), (7, (), 6)])
def test_a_step_is_made_with_the_settings_of_its_time(changed: Path, step: int, gone: tuple[int, ...], origin: int):
    for one in gone:
        shutil.rmtree(checkpoint_folder(changed, one))
    found = replay(changed, step)
    assert found["from_step"] == origin
    assert {key: found[key] for key in ("loss", "grad_norm", "lr")} == found["recorded"]
    first, last = found["rows"]
    assert last - first + 1 == (4 if step <= 4 else 8)


def test_a_step_that_follows_from_two_settings_is_refused(changed: Path):
    for one in (4, 6):
        shutil.rmtree(checkpoint_folder(changed, one))
    with pytest.raises(
        UserError, match=r"resumed after step 4 with others \(.*train.batch_tokens 64 → 128.*\); replay a"
    ):
        replay(changed, 7)


def test_a_step_is_split_into_the_micro_batches_of_its_time(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "split")
    shutil.rmtree(checkpoint_folder(copy, 8))
    rows = str(4 // tiny.run_config(run).train.first_rows)
    assert main(["train", "--resume", str(copy), "--train.micro-batch-rows", rows]) == 0
    found = replay(copy, 8)
    assert {key: found[key] for key in ("loss", "grad_norm")} == {
        key: found["recorded"][key] for key in ("loss", "grad_norm")
    }
