"""`regpt verify-resume`: the certificate of a run that goes on, and of one that does not."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.manifest import write_manifest
from regpt.errors import UserError
from regpt.runs.pretrain import pretrain
from regpt.runs.verify_resume import RunCommands, RunDifference, compare_runs, killed_run, sentence

POSIX = pytest.mark.skipif(os.name != "posix", reason="kills processes")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "run"
    assert pretrain(tiny.run_config(shards), folder) == 0
    return folder


def test_a_run_is_bitwise_itself(run: Path):
    found = compare_runs(run, run)
    assert found == RunDifference(8, True, 0.0, 0.0)
    kills = {"world_sizes": [1, 1], "kills": [{"steps_done": 3, "checkpoint": 2}], "must_be_bitwise": True}
    said = sentence(asdict(found) | kills | {"tolerance": 0.01, "passed": True})
    assert said == "8 steps on 1 process, killed after 3: bitwise equal, as it must be (bitwise)"


@pytest.mark.parametrize(("by", "within"), [(1e-6, True), (3.0, False)])
def test_a_changed_weight_fails_the_deterministic_and_the_tolerant_certificate(run, tmp_path, by: float, within: bool):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    folder = checkpoint_folder(other, 8)
    weights = load_file(folder / "model.safetensors")
    weights["wpe.weight"] += by * torch.linspace(-1, 1, 16)
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    found = compare_runs(run, other)
    assert not found.bitwise
    assert (found.weight_difference <= 0.01) is within


def test_a_changed_or_missing_row_fails_the_certificate(run: Path, tmp_path: Path):
    for change in (lambda row: row | {"loss": row["loss"] * 1.1}, lambda row: None):
        other = tmp_path / str(change)
        shutil.copytree(run, other)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [change(row) if (row["kind"], row["step"]) == ("train", 5) else row for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows if row is not None)
        (other / "metrics.jsonl").write_text(text, encoding="utf-8")
        found = compare_runs(run, other)
        assert not found.bitwise
        assert found.loss_difference > 0.01


def bench(folder: Path, script: str) -> RunCommands:
    """Runs `script` in the place of every command."""

    class Scripted(RunCommands):
        def start(self, *args: str) -> subprocess.Popen[bytes]:
            self.commands.append(" ".join(["regpt", *args]))
            with (folder / "output.txt").open("ab") as output:
                return subprocess.Popen([sys.executable, "-c", script], stdout=output, stderr=output)

    folder.mkdir()
    return Scripted(folder, random.Random(0), lambda text: None)


@POSIX
def test_a_run_that_ends_by_itself_is_not_called_killed(tmp_path: Path):
    """Neither one that fails, whose failure is named, nor one that is complete too soon."""
    crash = "import sys; print('regpt: step 3: the loss is nan'); sys.exit(1)"
    for number, (script, said) in enumerate({crash: "1: step 3: the loss is nan", "": "give more --steps"}.items()):
        one = bench(tmp_path / str(number), script)
        with pytest.raises(UserError, match=said):
            killed_run(one, tmp_path / "config.toml", tmp_path / "run", 8, 1, 1, 1)
    with pytest.raises(UserError, match="regpt train there ended with 1: step 3: the loss is nan"):
        bench(tmp_path / "other", crash).finish("train", "there")


def test_a_changed_average_fails_the_certificate(shards, tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert pretrain(tiny.change(tiny.run_config(shards), "train", ema_decay=0.9), ours) == 0
    shutil.copytree(ours, theirs)
    assert compare_runs(ours, theirs).bitwise
    folder = checkpoint_folder(theirs, 8)
    average = load_file(folder / "ema.safetensors")
    average["wpe.weight"][0, 0] += 1e-3
    save_file(average, folder / "ema.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert not compare_runs(ours, theirs).bitwise


@POSIX
@pytest.mark.slow
def test_a_killed_run_gets_its_certificate(shards, tmp_path: Path, capsys):
    config = tiny.change(tiny.run_config(shards), "train", deterministic=True)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    out = str(tmp_path / "out")
    assert (
        main(["verify-resume", str(tmp_path / "config.toml"), "--steps", "16", "--kills", "2", "--out", out, "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    killed, other = found["comparisons"]["killed"], found["comparisons"]["other_world_size"]
    assert (killed["bitwise"], killed["must_be_bitwise"], len(killed["kills"])) == (True, True, 2)
    assert (other["bitwise"], other["must_be_bitwise"], other["world_sizes"]) == (False, False, [1, 2])
    assert other["loss_difference"] < 1e-3


def test_what_cannot_be_verified_is_refused(shards, tmp_path: Path, capsys):
    (tmp_path / "config.toml").write_text(tiny.run_config(shards).to_toml(), encoding="utf-8")
    assert main(["verify-resume", str(tmp_path / "config.toml"), "--kills", "0"]) == 2
    assert "--kills is 0, must be at least 1" in capsys.readouterr().err
    assert main(["verify-resume", str(tmp_path / "config.toml"), "--other-nproc", "3"]) == 2
    assert "is not a multiple of 48" in capsys.readouterr().err
