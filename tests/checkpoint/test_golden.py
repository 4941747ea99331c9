"""A checkpoint that format version 1 has written stays readable: what it holds, and the run that goes on from it.

`tests/goldens/make_run.py` says how it was made. When a test here fails, the reader has to be mended, not the golden.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint, newest_checkpoint
from regpt.checkpoint.manifest import FORMAT_VERSION
from regpt.checkpoint.open import open_model
from regpt.checkpoint.state import DataPosition
from regpt.errors import UserError
from regpt.report.read import rows_by_step
from regpt.runs.folder import read_run_config
from regpt.runs.pretrain import resume

GOLDEN = Path(__file__).parents[1] / "goldens" / "run-1"
MANIFEST_SHA256 = "5513317ea41814ace1afe8a9bbc165986fe59f188b22efca8876aca863b9cc55"
# Of all tensors of a kind, in the order of their names: name, shape, float32 values. Computed with `struct` and `json`.
TENSORS_SHA256 = {
    "model": "f32f274778e8780aa1e83b526ab84dbf73e7cfb3b83aa8003c02c43bb1f6225e",
    "optimizer": "35488a32ca14dba43903643998060443e8c6b23155b37d1ad835eedc424df48e",
    "ema": "b5c01880a99d9c6c9d85ffb11fe085c3523316cd1b3a32318b0f451490478a4a",
}
LN_F = [1.0269412994384766, 1.0158404111862183, 1.0313310623168945, 1.0040796995162964]
LOSSES = {5: 5.37606954574585, 6: 5.323505401611328}  # of the run that was not stopped


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy: nothing writes into the golden."""
    return shutil.copytree(GOLDEN, tmp_path / "run")


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {list(tensors[name].shape)}\n".encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def test_the_golden_is_the_one_that_was_written():
    manifest = checkpoint_folder(GOLDEN, 4) / "manifest.json"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == MANIFEST_SHA256
    assert newest_checkpoint(GOLDEN, warn=pytest.fail) == checkpoint_folder(GOLDEN, 4)


def test_every_number_of_it_is_read_as_it_was_written():
    checkpoint = load_checkpoint(checkpoint_folder(GOLDEN, 4))
    read = {"model": checkpoint.weights(), "optimizer": checkpoint.optimizer(), "ema": checkpoint.average()}
    assert {stem: digest(dict(tensors)) for stem, tensors in read.items()} == TENSORS_SHA256
    assert checkpoint.weights()["ln_f.weight"].tolist() == LN_F
    assert checkpoint.optimizer()["exp_avg_sq/ln_f.bias"][0].item() == 0.00010725124593591318


def test_its_state_is_read_as_it_was_written():
    state = load_checkpoint(checkpoint_folder(GOLDEN, 4)).state
    sha256 = hashlib.sha256((GOLDEN / "data" / "manifest.json").read_bytes()).hexdigest()
    assert state.data == DataPosition(sha256, next_row=16, seq_len=8, order="shuffle", seed=5)
    assert (state.step, state.average_updates) == (4, 4)
    assert state.schedule == {"name": "cosine", "steps": 6, "lr": 0.008681980515339464}
    assert state.trainer["guard"]["losses"] == [
        5.562099456787109,
        5.556168556213379,
        5.478616714477539,
        5.444414138793945,
    ]
    assert [sorted(of_rank) for of_rank in state.random] == [["cpu", "numpy", "python"]]
    assert (state.config["train"]["seed"], state.config["optim"]["lr"]) == (3, 0.01)


def test_it_writes_text():
    opened = open_model(str(GOLDEN))
    assert (opened.step, opened.tokenizer.decode(opened.tokenizer.encode("ba domi"))) == (4, "ba domi")
    assert main(["sample", str(GOLDEN), "--prompt", "ba", "-n", "1", "--max-new-tokens", "2", "--ema"]) == 0


def test_its_run_goes_on_to_the_losses_of_the_run_that_was_not_stopped(run):
    config = read_run_config(run)
    assert resume(run, replace(config, data=replace(config.data, path=str(run / "data")))) == 0
    rows = rows_by_step(run, "train")
    assert {step: row["loss"] for step, row in rows.items()} == pytest.approx(LOSSES, rel=1e-5)  # another CPU, or torch
    assert load_checkpoint(checkpoint_folder(run, 6)).state.data.next_row == 24


@pytest.mark.parametrize("more", [{}, {"signature": "a key that we do not know"}])
def test_a_checkpoint_of_a_newer_regpt_is_refused_with_one_sentence(run, capsys, more):
    path = checkpoint_folder(run, 4) / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | more | {"format_version": FORMAT_VERSION + 1}), encoding="utf-8")
    said = (
        rf"manifest\.json' has format version {FORMAT_VERSION + 1}, this regpt reads {FORMAT_VERSION}; install a newer"
    )
    with pytest.raises(UserError, match=said):
        load_checkpoint(path.parent)
    assert main(["sample", str(path.parent), "--prompt", "ba"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "regpt: ")
