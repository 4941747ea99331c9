"""A run that was stopped goes on as if it had not been, through the commands' own code."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.cli.train import main
from regpt.errors import UsageError, UserError
from regpt.parallel.signals import EXIT_SAVED, KINDS
from regpt.runs.pretrain import check, pretrain, resume
from regpt.runs.terminal import Terminal
from regpt.train.backend import DataParallel


def last_rows(run: Path) -> dict[tuple, tuple]:
    """(kind, step) → the numbers that do not depend on time; where a step occurs twice the last row counts."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        (row["kind"], row["step"]): tuple(row.get(key) for key in ("loss", "lr", "grad_norm", "bpb", "tokens"))
        for row in rows
        if row["kind"] in ("train", "val")
    }


def texts(run: Path) -> dict[int, list[str]]:
    """Step → samples."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["texts"] for row in rows}


def test_the_run_learns_and_writes_what_it_should(straight):
    rows = last_rows(straight)
    assert [step for kind, step in rows if kind == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for kind, step in rows if kind == "val"] == [0, 3, 6, 8]
    assert rows["train", 8][0] < rows["train", 1][0] - 0.5
    assert rows["val", 8][0] < rows["val", 0][0] - 0.5
    assert list(texts(straight)) == [0, 4, 8]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_continues_bitwise_from_any_checkpoint(straight, tmp_path: Path, step: int):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for later in range(step + 2, 9, 2):
        shutil.rmtree(checkpoint_folder(run, later))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"kind": "tra', encoding="utf-8")  # torn by the crash
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert last_rows(run) == last_rows(straight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_and_the_rest_of_the_run_is_bitwise_the_same(config, straight, tmp_path, monkeypatch, kind):
    run, show = tmp_path / "run", Terminal.row

    def interrupt(self: Terminal, row: dict) -> None:
        show(self, row)
        if row["kind"] == "train" and row["step"] == 3:
            signal.raise_signal(kind)

    before = signal.getsignal(kind)
    monkeypatch.setattr(Terminal, "row", interrupt)
    assert pretrain(config, run) == EXIT_SAVED == 75
    assert signal.getsignal(kind) is before
    assert checkpoint_folder(run, 3).is_dir()
    assert max(step for _, step in last_rows(run)) == 3
    monkeypatch.undo()
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert last_rows(run) == last_rows(straight)
    assert texts(run) == texts(straight)


@pytest.mark.parametrize("asked", [True, False])
def test_a_compiler_that_ctrl_c_killed_is_that_stop(config, straight, tmp_path, monkeypatch, asked):
    run, forward_backward = tmp_path / "run", DataParallel.forward_backward

    def killed(self: DataParallel, *args):
        if self.mesh.pulse.step == 4:
            if asked:
                signal.raise_signal(signal.SIGINT)
            raise InductorError(RuntimeError("C++ compile error"), sys._getframe())
        return forward_backward(self, *args)

    monkeypatch.setattr(DataParallel, "forward_backward", killed)
    if not asked:
        with pytest.raises(InductorError, match=r"C\+\+ compile error"):
            pretrain(config, run)
        return
    assert pretrain(config, run) == EXIT_SAVED
    monkeypatch.undo()
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert last_rows(run) == last_rows(straight)


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(straight, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert last_rows(run) == last_rows(straight)


def test_the_runs_own_config_repeats_it(straight, tmp_path: Path):
    chance = torch.get_rng_state()
    assert main([str(straight / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    assert tiny.final_files(tmp_path / "again") == tiny.final_files(straight)
    assert texts(tmp_path / "again") == texts(straight)
    assert torch.get_rng_state().equal(chance)  # initialisation, order and samples have generators of their own


def test_padding_changes_no_checkpoint(config, straight, tmp_path: Path):
    """Bitwise in the shapes; the numbers may differ by the rounding of another matrix product."""
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert pretrain(tiny.change(config, "train", pad_vocab=False), run) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(checkpoint_folder(r, 8) / name) for r in (run, straight))
        assert tiny.largest_error(ours, theirs) < 1e-3


def test_shards_that_changed_since_are_refused(straight, shards, tmp_path: Path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    shutil.copytree(straight, run)
    text = (run / "config.toml").read_text(encoding="utf-8").replace(str(shards), str(data))
    (run / "config.toml").write_text(text, encoding="utf-8")
    assert resume(run) == 0
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    manifest["options"]["val_fraction"] = 0.3
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"are not those that .*step-00000008 was trained on.*restore them"):
        resume(run)


@pytest.mark.parametrize(
    ("also", "sentence"),
    [
        (["--out", "x"], "--resume continues a run in its folder and --out starts a new one"),
        (["--init-from", "x"], "--resume continues a run in its folder and --init-from starts a new one"),
        (["gpt2-tiny"], "RECIPE and --resume exclude each other"),
        (["--fork-from", "x"], "--resume and --fork-from exclude each other"),
    ],
)
def test_what_contradicts_resume_is_refused(straight, also: list[str], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        main(["--resume", str(straight), *also])


def test_a_run_never_goes_over_another(config, straight):
    with pytest.raises(UserError, match="already holds a run; go on with: regpt train --resume"):
        pretrain(config, straight)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("sample", {"max_new_tokens": 40}, r"exceed the model's length of 16; sample.max_new_tokens \d+ is the most"),
        ("sample", {"prompt": "ba do mi " * 9}, r"the prompt has \d+ tokens and the model reads 16; shorten"),
        ("train", {"batch_tokens": 100}, r"batch_tokens 100 is not a multiple of 16 .*to 96 or 112"),
        (
            "model",
            {"vocab_size": 299},
            r"a vocabulary of 300 tokens .*has 299; set --model\.vocab-size 300, leave it out",
        ),
        ("optim", {"decay_steps": 2}, r"decay_steps is 2 but the warmup takes 2 steps"),
        ("data", {"path": "nowhere"}, r"data folder 'nowhere' does not exist"),
        ("data", {"path": ""}, r"no data was given; add --data DIR"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_exists(config, tmp_path, section, values, sentence):
    with pytest.raises(UserError, match=sentence):
        check(tiny.change(config, section, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_rows_are_refused(config, tmp_path):
    with pytest.raises(UsageError, match=r"5 processes are more than the 4 rows.*at most 4"):
        check(config, tmp_path / "run", processes=5)


def test_weights_of_another_shape_are_refused_before_the_run_exists(config, straight, tmp_path):
    with pytest.raises(UserError, match=r"is a model of another shape \(n_layer 1, not 2\)"):
        pretrain(tiny.change(config, "model", n_layer=2), tmp_path / "run", init_from=str(straight))
    assert not (tmp_path / "run").exists()


def test_a_run_may_start_from_the_weights_of_another(config, straight, tmp_path):
    run = tmp_path / "run"
    config = tiny.change(config, "model", dropout=0.1)  # no part of the shape
    assert pretrain(config, run, init_from=str(straight)) == 0
    assert last_rows(run)["val", 0] == last_rows(straight)["val", 8]
    assert json.loads((run / "env.json").read_text(encoding="utf-8"))["init_from"] == str(straight)
