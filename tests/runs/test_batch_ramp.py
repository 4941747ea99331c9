"""A run with `train.batch_ramp` is its stages one after the other, exactly, wherever it is stopped."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint
from regpt.cli.plan import main as plan_command
from regpt.config import RunConfig
from regpt.errors import UsageError
from regpt.runs import build
from regpt.runs.build import build_loader, open_corpus
from regpt.runs.plan import make_plan
from regpt.runs.pretrain import fork, pretrain, resume
from regpt.runs.replay import replay
from regpt.train.peak import flops_per_token

RAMP = ((192, 96, 24), (384, 192, 48))  # 3 steps of 4 × 16, 2 of 4 × 24, 3 of 4 × 48
TOKENS = [64, 128, 192, 288, 384, 576, 768, 960]


@pytest.fixture(scope="module")
def config(config) -> RunConfig:
    config = replace(config, model=replace(config.model, max_seq_len=48))
    config = tiny.change(config, "train", batch_ramp=RAMP, deterministic=True)
    config = tiny.change(config, "optim", schedule="constant")
    return tiny.change(config, "checkpoint", every_steps=1)


@pytest.fixture(scope="module")
def ramp(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ramp") / "run"
    assert pretrain(config, run) == 0
    return run


def stopped(run: Path, copy: Path, step: int) -> Path:
    shutil.copytree(run, copy)
    for folder in checkpoints(copy):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step), encoding="utf-8")
    return copy


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in tiny.rows_of(run, "train")}


@pytest.mark.parametrize("step", range(1, 8))
def test_it_goes_on_bitwise_from_every_step(ramp, step, tmp_path):
    run = stopped(ramp, tmp_path / "run", step)
    assert resume(run) == 0
    assert losses(run) == losses(ramp)
    assert tiny.final_files(run) == tiny.final_files(ramp)
    assert [row["tokens"] for row in tiny.rows_of(run, "train")] == TOKENS


def run_on(run: Path) -> int:
    return resume(run)


@pytest.mark.parametrize("step", [1, 3])
def test_another_number_of_processes_reads_the_same_rows(ramp, step, tmp_path):
    run = stopped(ramp, tmp_path / "run", step)
    assert tiny.in_processes(2, run_on, run) == [0, 0]
    assert losses(run) == pytest.approx(losses(ramp), rel=1e-5)
    state = load_checkpoint(checkpoint_folder(run, 8)).state
    assert (state.data.next_row, state.data.seq_len) == (TOKENS[-1], 1)


@pytest.mark.parametrize("order", [{"order": "sequential"}, {"shuffle_rows": "none"}])
def test_it_is_bitwise_its_stages_as_runs_of_their_own(config, order, tmp_path):
    config = tiny.change(config, "data", **order)
    assert pretrain(config, tmp_path / "ramp") == 0
    alone = tiny.change(config, "train", batch_ramp=(), steps=3)
    assert pretrain(alone, tmp_path / "first") == 0
    source = tmp_path / "first"
    for name, steps, batch_tokens, seq_len in (("second", 5, 96, 24), ("third", 8, 192, 48)):
        stage = tiny.change(
            tiny.change(alone, "train", steps=steps, batch_tokens=batch_tokens), "data", seq_len=seq_len
        )
        assert fork(stage, checkpoints(source)[-1], tmp_path / name) == 0
        source = tmp_path / name
    stages = {step: x for name in ("first", "second", "third") for step, x in losses(tmp_path / name).items()}
    assert stages == losses(tmp_path / "ramp")
    assert tiny.final_files(source) == tiny.final_files(tmp_path / "ramp")


def test_permuted_rows_of_the_last_stage_are_those_of_a_fork_from_the_stage_before(config, ramp, tmp_path):
    """The rest of the ramp, as a ramp of its own from the checkpoint of a boundary."""
    longer = tiny.change(config, "train", steps=9)
    assert fork(longer, checkpoint_folder(ramp, 5), tmp_path / "run") == 0
    assert {step: x for step, x in losses(tmp_path / "run").items() if step < 9} == {
        step: x for step, x in losses(ramp).items() if step > 5
    }


def test_tokens_flops_and_the_change_of_stage_are_logged(ramp):
    rows, model = tiny.rows_of(ramp, "train"), load_checkpoint(checkpoint_folder(ramp, 8))
    assert [row["tokens"] for row in rows] == TOKENS
    built = tiny.make_model(tiny.replace(tiny.run_config(ramp).model, max_seq_len=48))
    each = [64 * flops_per_token(built, 16), 96 * flops_per_token(built, 24), 192 * flops_per_token(built, 48)]
    assert rows[-1]["flops"] == 3 * each[0] + 2 * each[1] + 3 * each[2]
    events = [row for row in tiny.rows_of(ramp, "event") if row["name"] == "batch_ramp"]
    assert [(e["at_step"], e["batch_tokens"], e["seq_len"]) for e in events] == [(4, 96, 24), (6, 192, 48)]
    assert model.state.trainer["tokens"] == TOKENS[-1]


def test_a_step_of_a_later_stage_is_replayed(ramp):
    found = replay(ramp, 7)
    assert found["loss"] == losses(ramp)[7]
    assert found["rows"] == [4, 7]  # of those of 48 tokens
    assert sum(document["tokens"] for document in found["documents"]) == 4 * 49


def test_a_batch_that_was_left_out_counts_as_read_over_a_resume_too(config, tmp_path, monkeypatch):
    config = tiny.change(config, "train", on_non_finite="skip")
    bad = build_loader(config, open_corpus(config), tiny.ALONE).step(1, 1)[2].idx

    def wrap(model, good):
        return lambda batch: good(batch) * (math.nan if batch.idx.equal(bad) else 1.0)

    monkeypatch.setattr(build, "make_backend", tiny.wrapping(wrap))
    assert pretrain(config, tmp_path / "straight") == 0
    assert [row["tokens"] for row in tiny.rows_of(tmp_path / "straight", "train")] == [
        64, 128, 224, 320, 512, 704, 896, 1088,
    ]  # fmt: skip
    assert load_checkpoint(checkpoint_folder(tmp_path / "straight", 8)).state.data.next_row == 1088 + 64
    for step in (1, 2, 3, 5):
        run = stopped(tmp_path / "straight", tmp_path / f"from-{step}", step)
        assert resume(run) == 0
        assert tiny.final_files(run) == tiny.final_files(tmp_path / "straight")


def test_a_longer_ramp_needs_force(ramp, config, tmp_path):
    run = stopped(ramp, tmp_path / "run", 4)
    other = tiny.change(config, "train", batch_ramp=(*RAMP, (700, 384, 48)))
    with pytest.raises(UsageError, match=r"train\.batch_ramp"):
        resume(run, other)
    assert resume(run, other, force=True) == 0
    assert [row["tokens"] for row in tiny.rows_of(run, "train")][-3:] == [576, 768, 1152]


def test_rows_longer_than_the_model_are_refused(config):
    with pytest.raises(UsageError, match=r"train\.batch_ramp has rows of 64 tokens, longer than model\.max_seq_len 48"):
        tiny.change(config, "train", batch_ramp=((128, 128, 64),))


def test_a_plan_is_the_sum_of_its_stages_and_needs_the_memory_of_the_largest(config):
    """Each stage planned alone, with the micro-batch that training gives it."""
    whole = make_plan(config, recipe="tiny", gpu="h100")
    run, found = whole["run"], whole["run"]["stages"]
    assert sum(one["steps"] for one in found) == run["steps"] == config.train.steps
    alone = []
    for one in found:
        keys = ("steps", "batch_tokens", "micro_batch_rows")
        part = tiny.change(config, "train", batch_ramp=(), **{key: one[key] for key in keys})
        alone.append(make_plan(tiny.change(part, "data", seq_len=one["seq_len"]), recipe="tiny", gpu="h100"))
    assert len(found) == len(RAMP) + 1
    assert {one["batch_tokens"] for one in found} == {config.train.batch_tokens, *(entry[1] for entry in RAMP)}
    for key in ("tokens", "flops", "tokens_per_parameter"):
        assert run[key] == pytest.approx(sum(one["run"][key] for one in alone))
    assert whole["memory"] == max((one["memory"] for one in alone), key=lambda memory: memory["needed_gib"])
    took = [one["time"]["step_ms"] * one["run"]["steps"] for one in alone]
    assert whole["time"]["step_ms"] * run["steps"] == pytest.approx(sum(took))
    assert sum(whole["time"]["parts_ms"].values()) == pytest.approx(whole["time"]["step_ms"])
    assert whole["time"]["tokens_per_s"] == pytest.approx(run["tokens"] / sum(took) * 1e3)
    assert sum(one["hours"] for one in found) == pytest.approx(sum(took) / 3.6e6)


def test_a_plan_leaves_out_stages_that_the_run_does_not_reach(config):
    short = tiny.change(config, "train", steps=1)
    assert make_plan(short, recipe="tiny", gpu="h100")["run"]["stages"] == []


def test_a_plan_warns_of_a_stage_that_the_devices_cannot_share(config):
    warnings = make_plan(config, recipe="tiny", gpu="h100", gpus=64)["warnings"]
    assert any("will refuse this" in one for one in warnings)


def test_the_command_prints_a_line_for_each_stage(config, tmp_path, capsys):
    path = tmp_path / "ramp.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert plan_command([str(path), "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert f"in {len(RAMP) + 1} stages" in shown
    assert [f"stage {n} " in shown for n in range(1, len(RAMP) + 3)] == [True] * (len(RAMP) + 1) + [False]
