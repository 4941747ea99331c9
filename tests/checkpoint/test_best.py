"""`checkpoint.keep_best`: the checkpoint of the lowest validation loss stays, is named, and is found again."""

import json
import shutil
from pathlib import Path

import pytest

import tiny
from regpt.__main__ import main
from regpt.checkpoint.best import at_step, best_step, validation_losses
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.config import RunConfig
from regpt.errors import UsageError
from regpt.runs.pretrain import pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_shards(tmp_path_factory.mktemp("best") / "shards")


def ruined(data: Path, **checkpoint: object) -> RunConfig:
    """Eight updates at a rate that soon ruins the model, of rows in an order that never changes."""
    config = tiny.change(tiny.run_config(data), "checkpoint", keep_best=True, keep_last=1, **checkpoint)
    config = tiny.change(config, "data", shuffle_rows="none")
    return tiny.change(config, "optim", lr=0.7, warmup_steps=7, schedule="constant")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ruined run: validated after 0, 3, 6 and 8, saved after 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("best") / "run"
    assert pretrain(ruined(data), folder) == 0
    return folder


def steps(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints(run)]


def test_the_lowest_validation_is_saved_though_no_checkpoint_is_due_and_stays(run: Path):
    losses = validation_losses(run / "metrics.jsonl")
    assert best_step({step: loss for step, loss in losses.items() if step}, losses) == 3
    assert losses == {row["step"]: row["loss"] for row in tiny.rows_of(run, "val")}
    assert steps(run) == ["step-00000003", "step-00000008"]


def test_a_resumed_run_keeps_it(run: Path, tmp_path: Path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    assert main(["train", "--resume", str(again), "--train.steps", "9"]) == 0
    assert steps(again) == ["step-00000003", "step-00000009"]


def test_without_keep_best_only_the_newest_stays(run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert main(["train", "--resume", str(other), "--train.steps", "10", "--checkpoint.keep-best", "False"]) == 0
    assert steps(other) == ["step-00000010"]


def test_list_sample_eval_and_export_take_it_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    losses = validation_losses(run / "metrics.jsonl")
    assert [(one["step"], one["loss"], one["best"]) for one in listed] == [(3, losses[3], True), (8, losses[8], False)]
    assert main(["checkpoint", "list", str(run)]) == 0
    assert f"validation loss {losses[3]:.4f}, the best" in capsys.readouterr().out
    options = ["--prompt", "ba", "-n", "1", "--max-new-tokens", "2", "--json"]
    for step, found in (("best", 3), ("3", 3), ("8", 8)):
        assert main(["sample", str(run), "--step", step, *options]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == found
    assert main(["eval", str(run), "--step", "best", "--val-tokens", "48", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["export", str(run), "--step", "best", "--out", str(tmp_path / "hf")]) == 0
    assert "step-00000003" in capsys.readouterr().out


def test_a_fork_and_a_verification_take_it_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    best = run / "checkpoints" / "best"
    assert main(["train", "--fork-from", str(best), "--out", str(tmp_path / "fork"), "--optim.lr", "1e-4"]) == 0
    parent = json.loads((tmp_path / "fork" / "env.json").read_text())["parent"]
    assert parent["checkpoint"] == str((run / "checkpoints" / "step-00000003").resolve())
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(best)]) == 0
    assert capsys.readouterr().out == "step-00000003  intact\n"


def test_a_damaged_best_gives_way_to_the_next(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (checkpoint_folder(broken, 3) / "model.safetensors").write_bytes(b"")
    assert main(["sample", str(broken), "--step", "best", "--prompt", "ba", "-n", "1", "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert "skipped step-00000003" in err
    assert not out or json.loads(out)["step"] == 8


def test_it_is_kept_and_found_in_a_bucket(data: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url, mine = f"file://{tmp_path}/bucket/run", tmp_path / "mine.toml"
    mine.write_text(ruined(data, staging=str(tmp_path / "s")).to_toml(), encoding="utf-8")
    assert main(["train", str(mine), "--out", url]) == 0
    assert steps(tmp_path / "bucket" / "run") == ["step-00000003", "step-00000008"]
    capsys.readouterr()
    options = ["--prompt", "ba", "-n", "1", "--max-new-tokens", "2", "--json"]
    assert main(["sample", url, "--step", "best", *options]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3


def test_a_step_back_and_what_is_not_finite_do_not_count(tmp_path: Path):
    def val(step: int, loss: object, **more: object) -> dict:
        return {"kind": "val", "step": step, "loss": loss, **more}

    rows = [
        val(2, 3.0),
        val(4, 1.0),
        {"kind": "event", "name": "rewind", "step": 3},
        val(4, 2.5),
        val(5, float("nan")),
        val(6, "nan"),
        val(6, 0.1, source="a"),
        {"kind": "event", "name": "spike", "step": 1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "val", "st', encoding="utf-8")
    assert validation_losses(path) == {2: 3.0, 4: 2.5}
    assert best_step({2: 3.0, 4: 2.5, 6: 2.5}, [2, 6]) == 6
    assert best_step({2: 1.0, 4: 1.0}, [4, 2]) == 2
    assert best_step({}, [4, 2]) is None
    assert validation_losses(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("model", "step", "said"),
    [
        ("run", "last", "--step is 'last', must be the number of a checkpoint's step or best"),
        ("run", "-1", "--step is '-1'"),
        ("run/checkpoints/step-00000003", "best", "is one; leave it out, or give the run"),
    ],
)
def test_a_step_that_cannot_be_meant_is_refused(model: str, step: str, said: str):
    with pytest.raises(UsageError, match=said):
        at_step(model, step)


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(run: Path):
    with pytest.raises(UsageError, match=r"has no checkpoint of step 7; choose from \d+, 8 or best"):
        at_step(str(run), "7")
    with pytest.raises(UsageError, match="'gpt2' has none; leave it out, or give a run"):
        at_step("gpt2", "7")
    assert at_step(f"{run}/", "8") == f"{run}/checkpoints/step-00000008"


def test_a_run_without_validation_has_no_best(data: Path, run: Path, tmp_path: Path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "metrics.jsonl").unlink()
    assert main(["sample", str(other), "--step", "best", "--prompt", "ba"]) == 1
    assert "no checkpoint whose validation loss is known; leave out 'best'" in capsys.readouterr().err
