"""Training from Python: in a process that is not ours, and stays as it was."""

import gc
import json
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import regpt
from regpt.config import RunConfig
from regpt.runs.terminal import Terminal
from tiny import IMPORTS_COMPILER

SHORT = {"train": {"steps": 3}, "eval": {"every_steps": 0}, "sample": {"every_steps": 0}}


def losses(run: regpt.TrainingRun) -> list[float]:
    return run.metrics["train"]["loss"].tolist()


def global_state() -> list[object]:
    _, keys, *_ = np.random.get_state()  # noqa: NPY002 (the global one)
    return [
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        keys.tolist(),
        dict(os.environ),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    ]


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch):
    """`interrupted_at(step, kind)`: the signal arrives when that step is shown."""

    def arrange(step: int, kind: signal.Signals = signal.SIGINT, times: int = 1) -> None:
        shown = Terminal.row

        def row(self: Terminal, row: dict) -> None:
            shown(self, row)
            if row["kind"] == "train" and row["step"] == step:
                for _ in range(times):
                    signal.raise_signal(kind)

        monkeypatch.setattr(Terminal, "row", row)

    return arrange


def test_a_run_from_python_is_that_of_the_command_line(config: RunConfig, straight: Path, tmp_path: Path):
    run = regpt.train(config, tmp_path / "run", quiet=True)
    assert losses(run) == regpt.read_run(straight).metrics["train"]["loss"].tolist()
    assert run.finished
    assert run.step == 8


def test_sections_change_the_recipe_and_nothing_else(config: RunConfig, shards: Path, tmp_path: Path):
    changed = {"train": {"steps": np.int64(2), "seed": 4}, "checkpoint": {"keep_last": 1}}
    run = regpt.train(config, tmp_path / "run", data=shards, quiet=True, **changed)
    expected = replace(config, train=replace(config.train, steps=2, seed=4))
    assert run.config.train == expected.train
    assert run.config.checkpoint.keep_last == 1
    assert run.config.model == config.model


def test_data_may_be_the_section(config: RunConfig, shards: Path, tmp_path: Path):
    bare = replace(config, data=replace(config.data, path=""))
    run = regpt.train(bare, tmp_path / "run", data={"path": shards, "seq_len": 8}, quiet=True, **SHORT)
    assert run.config.data.seq_len == 8


def test_a_recipe_by_name_and_by_file_are_read(config: RunConfig, tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    run = regpt.train(file, tmp_path / "run", quiet=True, **SHORT)
    assert run.config.optim == config.optim
    with pytest.raises(regpt.UserError, match="no data was given"):
        regpt.train("gpt2-tiny", tmp_path / "other")


def test_two_runs_in_one_process_do_not_see_each_other(config: RunConfig, tmp_path: Path):
    first = regpt.train(config, tmp_path / "first", quiet=True, **SHORT)
    between = {**SHORT, "train": {"steps": 3, "seed": 9, "precision": "bf16", "deterministic": True}}
    regpt.train(config, tmp_path / "between", quiet=True, **between)
    again = regpt.train(config, tmp_path / "again", quiet=True, **SHORT)
    assert losses(first) == losses(again)


def test_a_run_leaves_the_process_as_it_was(config: RunConfig, tmp_path: Path):
    torch.manual_seed(11)
    before = global_state()
    deterministic = {**SHORT, "train": {"steps": 3, "precision": "bf16", "deterministic": True}}
    regpt.train(config, tmp_path / "run", quiet=True, **deterministic)
    assert global_state() == before
    with pytest.raises(regpt.UserError):
        regpt.train(config, tmp_path / "run", quiet=True)
    torch.manual_seed(12)
    before = global_state()
    regpt.resume(tmp_path / "run", train={"steps": 4}, force=True, quiet=True)
    regpt.evaluate(tmp_path / "run", val_tokens=64, precision="bf16")
    assert global_state() == before


def test_a_run_leaves_no_threads(config: RunConfig, tmp_path: Path):
    before = set(threading.enumerate())
    regpt.train(config, tmp_path / "run", quiet=True, **SHORT)
    gc.collect()  # which ends those of what was let go
    new = set(threading.enumerate()) - before
    for thread in new:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in new)


def test_a_quiet_run_prints_nothing(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    regpt.train(config, tmp_path / "run", quiet=True, **SHORT)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_saves_and_then_raises(config: RunConfig, straight: Path, tmp_path: Path, interrupted_at):
    interrupted_at(3)
    with pytest.raises(KeyboardInterrupt):
        regpt.train(config, tmp_path / "run", quiet=True, checkpoint={"every_steps": 0})
    assert regpt.read_run(tmp_path / "run").step == 3
    run = regpt.resume(tmp_path / "run", quiet=True)
    assert losses(run) == regpt.read_run(straight).metrics["train"]["loss"].tolist()


def test_a_second_ctrl_c_raises_at_once(config: RunConfig, tmp_path: Path, interrupted_at, monkeypatch):
    monkeypatch.setattr("regpt.runs.stop.SAME_PRESS_SECONDS", -1.0)
    interrupted_at(3, times=2)
    with pytest.raises(KeyboardInterrupt):
        regpt.train(config, tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-00000003"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_to_terminate_reaches_the_users_handler(config: RunConfig, tmp_path: Path, interrupted_at):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda kind, frame: seen.append(kind))
    try:
        interrupted_at(3, signal.SIGTERM)
        run = regpt.train(config, tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert (run.step, run.finished) == (3, False)


def test_a_thread_can_train(config: RunConfig, tmp_path: Path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(regpt.train(config, tmp_path / "run", quiet=True, **SHORT)))
    thread.start()
    thread.join()
    assert [run.step for run in runs] == [3]


@pytest.mark.slow
@IMPORTS_COMPILER
def test_every_run_is_compiled_however_many_came_before(config: RunConfig, tmp_path: Path):
    counters = pytest.importorskip("torch._dynamo.utils").counters["frames"]
    with torch._dynamo.config.patch(recompile_limit=1):  # 8, without this: a search makes as many models
        for n_embd in (16, 24):
            made = counters["ok"]
            compiled = {**SHORT, "model": {"n_embd": n_embd}, "train": {"steps": 2, "compile": True}}
            regpt.train(config, tmp_path / str(n_embd), quiet=True, **compiled)
            assert counters["ok"] > made


def test_init_from_starts_with_that_models_weights(config: RunConfig, straight: Path, tmp_path: Path):
    run = regpt.train(config, tmp_path / "run", init_from=straight, quiet=True, **SHORT)
    assert run.metrics["train"]["loss"][0] < regpt.read_run(straight).metrics["train"]["loss"][0]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"trian": {"steps": 1}}, "did you mean 'train'"),
        ({"train": {"stpes": 1}}, "did you mean 'steps'"),
        ({"train": {"steps": "1"}}, "train.steps is '1'"),
        ({"train": 3}, "is not a section"),
        ({"train.steps": 3}, "write train={'steps': 3}"),
        ({"data": {"seq_len": 99}}, "max_seq_len"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config: RunConfig, tmp_path: Path, sections: dict, said: str):
    with pytest.raises(regpt.UsageError, match=said):
        regpt.train(config, tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()


def test_refusals_are_user_errors_never_exits(tmp_path: Path, config: RunConfig):
    with pytest.raises(regpt.UsageError, match="did you mean 'gpt2-tiny'"):
        regpt.train("gpt2-tinny", tmp_path / "run")
    with pytest.raises(regpt.UserError, match="does not exist"):
        regpt.resume(tmp_path / "nothing")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("", encoding="utf-8")
    with pytest.raises(regpt.UserError, match="not empty"):
        regpt.train(config, tmp_path / "used")


def test_the_command_that_started_it_is_kept(straight: Path, config: RunConfig, tmp_path: Path):
    run = regpt.train(config, tmp_path / "run", quiet=True, **SHORT)
    assert json.loads((tmp_path / "run" / "env.json").read_text(encoding="utf-8")) == run.env
