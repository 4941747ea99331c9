"""Going on with other settings: more steps and what changes nothing are free, the rest is listed, forced or forked."""

import json
import re
import shutil
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint
from regpt.checkpoint.state import DataPosition
from regpt.cli.train import main
from regpt.errors import UsageError, UserError
from regpt.runs.changes import changes, first_row
from regpt.runs.folder import read_run_config
from regpt.runs.pretrain import fork, pretrain, resume


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in tiny.rows_of(run, "train")}


def event(run: Path, name: str) -> dict:
    return [row for row in tiny.rows_of(run, "event") if row["name"] == name][-1]


def test_a_run_is_extended_by_a_flag_and_remembers_it(config, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert main(["--resume", str(run), "--train.steps", "12"]) == 0
    said = "changed: train.steps 8 → 12; the learning rate of step 9 is 4.11e-03 instead of 1.00e-03"
    assert said in capsys.readouterr().out
    assert read_run_config(run).train.steps == 12
    assert event(run, "resume")["changed"] == {"train.steps": [8, 12]}
    assert max(losses(run)) == 12
    assert main(["--resume", str(run)]) == 0  # nothing left to do
    assert event(run, "resume")["changed"] == {}


def test_an_extended_run_of_constant_rate_is_the_longer_run(config, tmp_path):
    config = tiny.change(config, "optim", schedule="constant")
    longer = tiny.change(config, "train", steps=12)
    assert pretrain(longer, tmp_path / "longer") == 0
    assert pretrain(config, tmp_path / "run") == 0
    assert resume(tmp_path / "run", tiny.change(read_run_config(tmp_path / "run"), "train", steps=12)) == 0
    assert tiny.final_files(tmp_path / "run") == tiny.final_files(tmp_path / "longer")


def test_what_changes_no_update_is_free(cut, straight, tmp_path, shards):
    moved = shutil.copytree(shards, tmp_path / "moved")
    flags = ["--train.micro-batch-rows", "2", "--eval.every-steps", "4", "--checkpoint.keep-last", "2"]
    assert main(["--resume", str(cut), "--data", str(moved), *flags]) == 0
    assert losses(cut) == pytest.approx(losses(straight), rel=1e-5)  # the same global batches
    assert len(checkpoints(cut)) == 2
    assert read_run_config(cut).data.path == str(moved)


@pytest.mark.parametrize(
    ("flags", "listed"),
    [
        (["--optim.lr", "0.02"], "optim.lr 0.01 → 0.02"),
        (["--train.batch-tokens", "128"], "train.batch_tokens 64 → 128"),
        (["--data.seed", "7", "--train.grad-clip", "0"], "data.seed 1337 → 7, train.grad_clip 1.0 → 0.0"),
        (["--train.steps", "6"], "train.steps 8 → 6"),
        (["--optim.decay-steps", "9"], "optim.decay_steps unset → 9"),
        (["--model.dropout", "0.1"], "model.dropout 0.0 → 0.1"),
    ],
)
def test_what_changes_the_run_is_refused_with_a_list_and_nothing_happens(cut, flags, listed):
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"this would be another run: {listed}; .*--force.*--fork-from"):
        main(["--resume", str(cut), *flags])
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_an_edited_config_toml_is_noticed_too(cut):
    text = (cut / "config.toml").read_text(encoding="utf-8")
    (cut / "config.toml").write_text(text.replace("beta2 = 0.95", "beta2 = 0.9"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"optim\.beta2 0\.95 → 0\.9;"):
        resume(cut)


def test_force_goes_on_with_another_rate_and_says_so(cut, straight):
    assert main(["--resume", str(cut), "--force", "--optim.lr", "0.02"]) == 0
    assert event(cut, "resume")["changed"] == {"optim.lr": [0.01, 0.02]}
    lr = {row["step"]: row["lr"] for row in tiny.rows_of(cut, "train")}
    expected = {row["step"]: row["lr"] for row in tiny.rows_of(straight, "train")}
    assert lr[8] == pytest.approx(2 * expected[8])
    assert losses(cut)[5] == losses(straight)[5]  # before the first update of the new rate
    assert losses(cut)[7] != losses(straight)[7]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train.steps", "3"], "train.steps is 3, but 4 updates are made already"),
        (["--model.n-layer", "2"], "the weights of the checkpoint have another shape: model.n_layer 1 → 2"),
    ],
)
def test_what_cannot_be_done_is_refused_even_with_force(cut, flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        main(["--resume", str(cut), "--force", *flags])


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_without_changes_is_the_same_run(straight, tmp_path):
    run, source = tmp_path / "fork", checkpoint_folder(straight, 4)
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert main(["--fork-from", str(source), "--out", str(run)]) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    assert min(losses(run)) == 5
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before
    assert load_checkpoint(checkpoint_folder(run, 4)).step == 4  # self-contained from its first moment


def test_a_fork_takes_other_settings_and_records_its_parent(straight, tmp_path):
    run, source = tmp_path / "fork", checkpoint_folder(straight, 4)
    flags = ["--optim.schedule", "wsd", "--optim.decay-steps", "3", "--train.steps", "10"]
    assert main(["--fork-from", str(source), "--out", str(run), *flags]) == 0
    config = read_run_config(run)
    assert (config.optim.schedule, config.train.steps, config.optim.warmup_steps) == ("wsd", 10, 2)
    parent = json.loads((run / "env.json").read_text(encoding="utf-8"))["parent"]
    assert parent["checkpoint"] == str(source.resolve())
    assert parent["step"] == 4
    assert len(parent["manifest_sha256"]) == 64
    assert parent["changed"] == {
        "train.steps": [8, 10],
        "optim.schedule": ["cosine", "wsd"],
        "optim.decay_steps": [None, 3],
    }
    assert event(run, "fork")["parent"] == parent
    assert [row["lr"] for row in tiny.rows_of(run, "train")][:3] == [0.01, 0.01, 0.01]
    assert losses(run)[5] == losses(straight)[5]
    assert min(losses(run)) == 5
    assert max(losses(run)) == 10


def test_a_fork_that_is_killed_at_once_begins_again(straight, config, tmp_path, monkeypatch):
    run, source = tmp_path / "fork", checkpoint_folder(straight, 4)
    monkeypatch.setattr("regpt.runs.pretrain.train", lambda *args, **options: 0)  # created, nothing else
    assert fork(config, source, run) == 0
    monkeypatch.undo()
    assert checkpoints(run) == []
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again(straight, config, tmp_path, monkeypatch):
    monkeypatch.setattr("regpt.runs.pretrain.train", lambda *args, **options: 0)
    assert pretrain(config, tmp_path / "run") == 0
    assert pretrain(config, tmp_path / "second", init_from=str(straight)) == 0
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0
    assert tiny.final_files(tmp_path / "run") == tiny.final_files(straight)
    assert resume(tmp_path / "second") == 0
    assert tiny.rows_of(tmp_path / "second", "val")[0]["loss"] == tiny.rows_of(straight, "val")[-1]["loss"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (".", r"is a run; give one of its checkpoints, such as .*step-00000008"),
        ("nothing", "is not a checkpoint; give"),
    ],
)
def test_a_fork_from_something_else_is_one_sentence(straight, tmp_path, source, sentence):
    with pytest.raises(UserError, match=sentence):
        main(["--fork-from", str(straight / source), "--out", str(tmp_path / "fork")])
    assert not (tmp_path / "fork").exists()


def test_a_fork_of_a_damaged_checkpoint_is_refused(straight, tmp_path):
    source = shutil.copytree(checkpoint_folder(straight, 4), tmp_path / "source")
    (source / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.safetensors' has 0 bytes"):
        main(["--fork-from", str(source), "--out", str(tmp_path / "fork")])
    assert not (tmp_path / "fork").exists()


# ---- the position in the data ----------------------------------------------------------------------------------------


def test_the_next_row_is_the_same_token_whatever_the_batch(straight, config):
    data = load_checkpoint(checkpoint_folder(straight, 4)).state.data
    sha = data.manifest_sha256
    assert first_row(data, 4, config, sha) == 0
    double = tiny.change(config, "train", batch_tokens=128)
    assert first_row(data, 4, double, sha) + 4 * 8 == data.next_row == 16
    short = tiny.change(config, "data", seq_len=12)
    assert (first_row(data, 4, short, sha) + 4 * 5) * 12 == 264  # the first row of 12 tokens from token 256 on


def test_other_data_or_another_order_is_read_from_its_beginning(straight, config):
    data = load_checkpoint(checkpoint_folder(straight, 4)).state.data
    for other, sha in (
        (config, "another"),
        (tiny.change(config, "data", seed=3), data.manifest_sha256),
        (tiny.change(config, "data", order="sequential"), data.manifest_sha256),
        (tiny.change(config, "data", shuffle_rows="none"), data.manifest_sha256),
    ):
        assert first_row(data, 4, other, sha) + 4 * 4 == 0


def test_a_run_that_changed_its_batch_goes_on_bitwise(cut, tmp_path):
    assert main(["--resume", str(cut), "--force", "--train.batch-tokens", "128", "--train.steps", "10"]) == 0
    assert load_checkpoint(checkpoint_folder(cut, 10)).state.data.next_row == 16 + 6 * 8
    again = tmp_path / "again"
    shutil.copytree(cut, again)
    for later in (8, 10):
        shutil.rmtree(checkpoint_folder(again, later))
    assert resume(again) == 0
    assert tiny.final_files(again) == tiny.final_files(cut)


def test_nothing_is_a_change_where_nothing_is_known():
    assert changes({}, {"train": {"steps": 3}}) == {}
    assert changes({"train": {"steps": 3}}, {"train": {"steps": 3}, "new": {"key": 1}}) == {"new.key": [None, 1]}


def test_a_checkpoint_in_the_place_of_a_run_says_both_ways_on(cut):
    folder = checkpoint_folder(cut, 4)
    with pytest.raises(UserError, match=rf"lies in one; give the run itself, {cut}, .*--fork-from {folder} "):
        read_run_config(folder)


def test_a_run_that_has_lost_its_configuration_can_be_forked(cut, tmp_path):
    (cut / "config.toml").unlink()
    folder = checkpoint_folder(cut, 4)
    with pytest.raises(UserError, match=rf"lost its config\.toml; restore it, or .*--fork-from {folder} "):
        read_run_config(cut)
    assert main(["--fork-from", str(folder), "--out", str(tmp_path / "fork")]) == 0


def test_a_run_of_before_shuffle_rows_goes_on_in_the_order_that_it_had(cut):
    """Its config.toml and state.json know neither the key nor its meaning."""
    run = tiny.change(read_run_config(cut), "data", shuffle_rows="none")
    (cut / "config.toml").write_text(without(run.to_toml(), 'shuffle_rows = "none"\n'), encoding="utf-8")
    assert read_run_config(cut).data.shuffle_rows == "none"
    before = without_key(run.sections())
    assert changes(before, run.sections()) == {}
    new = tiny.change(run, "data", shuffle_rows="epoch")
    assert changes(before, new.sections()) == {"data.shuffle_rows": ["none", "epoch"]}
    position = DataPosition("a", next_row=40, seq_len=16, order="shuffle", seed=1337)
    assert first_row(position, 5, run, "a") == 40 - 5 * 4
    assert first_row(position, 5, new, "a") == -5 * 4  # another order: from its beginning


def without(text: str, line: str) -> str:
    assert line in text
    return text.replace(line, "")


def without_key(sections: dict) -> dict:
    return sections | {"data": {key: value for key, value in sections["data"].items() if key != "shuffle_rows"}}


def test_tokens_and_flops_are_those_read_whatever_the_batch_was(cut, straight, tmp_path):
    (before,) = (row for row in tiny.rows_of(cut, "train") if row["step"] == 4)
    each, flops = before["tokens"] // 4, before["flops"] // before["tokens"]
    longer = ["--train.batch-tokens", str(2 * each), "--train.steps", "10"]
    assert main(["--resume", str(cut), "--force", *longer]) == 0
    assert main(["--fork-from", str(checkpoint_folder(straight, 4)), "--out", str(tmp_path / "fork"), *longer]) == 0
    assert resume(cut) == 0
    for run in (cut, tmp_path / "fork"):
        rows = {row["step"]: (row["tokens"], row["flops"]) for row in tiny.rows_of(run, "train")}
        read = {step: 4 * each + (step - 4) * 2 * each for step in range(5, 11)}
        assert {step: rows[step] for step in read} == {step: (n, n * flops) for step, n in read.items()}
    begin = event(tmp_path / "fork", "fork")
    assert (begin["tokens"], begin["flops"]) == (4 * each, 4 * each * flops)
    assert event(cut, "resume")["tokens"] == 4 * each + 6 * 2 * each


def test_a_rate_that_differs_in_a_late_digit_is_shown_with_it(cut, capsys):
    assert main(["--resume", str(cut), "--force", "--optim.lr", "0.0100001"]) == 0
    rates = re.search(r"the learning rate of step 5 is (\S+) instead of (\S+)", capsys.readouterr().out)
    assert rates
    assert rates[1] != rates[2]


def test_a_run_that_cannot_validate_says_so(shards, tmp_path, capsys):
    only = tmp_path / "only"
    shutil.copytree(shards, only)
    manifest = json.loads((only / "manifest.json").read_text())
    manifest["shards"] = [one for one in manifest["shards"] if one["split"] == "train"]
    (only / "manifest.json").write_text(json.dumps(manifest))
    config = tiny.change(tiny.run_config(only), "checkpoint", keep_best=True)
    assert pretrain(config, tmp_path / "run") == 0
    said = "no validation: the data hold out nothing, so that checkpoint.keep_best has nothing to choose by; prepare"
    assert said in capsys.readouterr().out
    config = tiny.change(tiny.change(tiny.run_config(shards), "checkpoint", keep_best=True), "eval", every_steps=0)
    assert pretrain(config, tmp_path / "never") == 0
    assert "validation at the end alone, so that checkpoint.keep_best has nothing" in capsys.readouterr().out
