"""Tasks while a model trains."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.cli.eval import main
from regpt.config import RunConfig
from regpt.errors import UsageError, UserError
from regpt.report.page import render
from regpt.report.read import read_run
from regpt.runs import evaluations
from regpt.runs.pretrain import check, pretrain, resume


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mc") / "q.jsonl"
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choices(["ba", "do", "mi", "ta", "ru"], k=n))

    rows = [
        {"ctx": words(1), "endings": [words(draw.randint(1, 3)) for _ in range(4)], "label": i % 4} for i in range(300)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def with_tasks(shards: Path, questions: Path, **values: object) -> RunConfig:
    return tiny.change(tiny.run_config(shards), "eval", tasks=f"hellaswag:{questions}", **values)


def test_tasks_are_evaluated_with_validation_and_give_what_regpt_eval_gives(shards, questions, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(with_tasks(shards, questions), run) == 0
    found = tiny.rows_of(run, "eval")
    assert [(row["step"], row["metric"]) for row in found] == [
        (s, m) for s in (0, 3, 6, 8) for m in ("acc", "acc_norm")
    ]
    assert {(row["task"], row["n"]) for row in found} == {("hellaswag", 300)}
    assert {path.name for path in (run / "evals").iterdir()} == {
        "hellaswag-step-00000008.jsonl",
        "val-step-00000008.jsonl",
    }
    assert "hellaswag after step 8: acc 0." in capsys.readouterr().out
    args = ["--tasks", f"hellaswag:{questions}", "--device", "cpu", "--json", "-"]
    assert main([str(run), *args]) == 0
    metrics = json.loads(capsys.readouterr().out)["tasks"]["hellaswag"]["metrics"]
    for row in found[-2:]:
        assert metrics[row["metric"]] == {"value": row["value"], "stderr": row["stderr"], "n": 300}


def test_tasks_are_judged_with_the_average_of_the_weights_too_where_asked(shards, questions, tmp_path, capsys):
    run, plain = tmp_path / "run", tmp_path / "plain"
    config = tiny.change(with_tasks(shards, questions), "train", ema_decay=0.97, seed=1)
    config = tiny.change(config, "data", shuffle_rows="none")  # an order of rows that never changes
    assert pretrain(tiny.change(config, "eval", ema=True), run) == 0
    assert pretrain(config, plain) == 0
    found = {(row["step"], row["metric"]): row["value"] for row in tiny.rows_of(run, "eval")}
    assert found.keys() == {(s, m + e) for s in (0, 3, 6, 8) for m in ("acc", "acc_norm") for e in ("", "_ema")}
    assert {key: value for key, value in found.items() if not key[1].endswith("_ema")} == {
        (row["step"], row["metric"]): row["value"] for row in tiny.rows_of(plain, "eval")
    }
    assert everything(run).keys() == everything(plain).keys()
    assert all(tensor.equal(everything(plain)[name]) for name, tensor in everything(run).items())
    lines = (run / "evals" / "hellaswag-step-00000008.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    capsys.readouterr()
    assert main([str(run), "--ema", "--tasks", f"hellaswag:{questions}", "--device", "cpu", "--json", "-"]) == 0
    metrics = json.loads(capsys.readouterr().out)["tasks"]["hellaswag"]["metrics"]
    for metric in ("acc", "acc_norm"):
        assert metrics[metric]["value"] == found[8, f"{metric}_ema"]
        assert sum(item[f"{metric}_ema"] for item in items) / 300 == pytest.approx(found[8, f"{metric}_ema"])
    assert any(item[metric] != item[f"{metric}_ema"] for item in items for metric in ("acc", "acc_norm"))


def test_items_longer_than_the_model_are_told_once_and_kept(shards, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    rows_ = [{"ctx": "ba do mi ta ru " * n, "endings": ["ba", "do"], "label": 0} for n in (1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_), encoding="utf-8")
    assert pretrain(tiny.change(tiny.run_config(shards), "eval", tasks=f"mc:{path}"), tmp_path / "run") == 0
    assert capsys.readouterr().out.count("are longer than the model's 16 tokens") == 1
    assert {row["cut"] for row in tiny.rows_of(tmp_path / "run", "eval")} == {1}


def test_a_stop_does_not_wait_for_the_tasks_that_are_left(shards, questions, tmp_path, capsys, monkeypatch):
    original = evaluations.evaluate_task

    def interrupted(task, scorer, **limits):
        if len(tiny.rows_of(tmp_path / "run", "train")) == 3:
            signal.raise_signal(signal.SIGTERM)  # while the first task is judged
        return original(task, scorer, **limits)

    monkeypatch.setattr(evaluations, "evaluate_task", interrupted)
    names = f"hellaswag:{questions},mc:{questions}"
    assert pretrain(tiny.change(tiny.run_config(shards), "eval", tasks=names), tmp_path / "run") == 75
    assert "asked to stop: the evaluation after step 3 ends before mc:" in capsys.readouterr().out
    assert [(row["step"], row["task"]) for row in tiny.rows_of(tmp_path / "run", "eval")][-2:] == [(3, "hellaswag")] * 2
    assert checkpoint_folder(tmp_path / "run", 4).is_dir()


def test_tasks_with_an_average_that_is_not_kept_are_refused(shards):
    with pytest.raises(
        UsageError, match=r"eval.ema asks for an average of the weights, which is not kept; set train.ema"
    ):
        tiny.change(tiny.run_config(shards), "eval", ema=True)


def everything(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after the last update."""
    folder = checkpoint_folder(run, 8)
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def test_training_is_bitwise_the_same_with_evaluation_on_and_off(shards, questions, tmp_path):
    off = tiny.change(tiny.run_config(shards), "eval", every_steps=0)
    states = []
    for name, config in (("on", with_tasks(shards, questions, every_steps=1)), ("off", off)):
        torch.manual_seed(1)
        assert pretrain(config, tmp_path / name) == 0
        states.append(torch.get_rng_state())
    assert len(tiny.rows_of(tmp_path / "on", "eval")) == 9 * 2
    on, off = (everything(tmp_path / name) for name in ("on", "off"))
    assert on.keys() == off.keys()
    assert all(on[name].equal(off[name]) for name in on)
    losses = [[row["loss"] for row in tiny.rows_of(tmp_path / name, "train")] for name in ("on", "off")]
    assert losses[0] == losses[1]
    assert states[0].equal(states[1])


def test_several_processes_evaluate_together(shards, questions, tmp_path):
    config = with_tasks(shards, questions)
    assert pretrain(config, tmp_path / "one") == 0
    assert tiny.in_processes(2, pretrain, config, tmp_path / "two") == [0, 0]
    one, two = (tiny.rows_of(tmp_path / name, "eval") for name in ("one", "two"))
    assert one[0]["value"] == two[0]["value"]  # at initialisation; later the weights differ by rounding
    assert len(one) == len(two)


def test_a_run_finds_the_files_of_its_tasks_from_another_folder(shards, questions, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.chdir(questions.parent)
    config = tiny.change(tiny.run_config(shards), "eval", tasks=f"hellaswag:{questions.name}", max_items=10)
    assert pretrain(config, run) == 0
    shutil.rmtree(checkpoint_folder(run, 8))
    monkeypatch.chdir(tmp_path)
    assert resume(run) == 0
    assert tiny.rows_of(run, "eval")[-1]["step"] == 8


def test_a_limit_of_items_takes_a_part(shards, questions, tmp_path):
    assert pretrain(with_tasks(shards, questions, max_items=40), tmp_path / "run") == 0
    assert {row["n"] for row in tiny.rows_of(tmp_path / "run", "eval")} == {40}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tasks": "hella"}, "task 'hella' is unknown"),
        ({"tasks": "val"}, "eval.tasks names val, which is evaluated anyway"),
        ({"tasks": "lm-eval:piqa"}, "eval.tasks names lm-eval, whose tasks are for a finished model"),
        ({"max_items": -1}, "eval.max_items is -1, must be 0 or more"),
    ],
)
def test_a_wrong_configuration_is_refused(shards, values, said):
    with pytest.raises(UsageError, match=said):
        tiny.change(tiny.run_config(shards), "eval", **values)


def test_what_cannot_be_evaluated_stops_before_the_run_begins(shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "eval", tasks=f"mc:{tmp_path / 'no.jsonl'}")
    with pytest.raises(UserError, match="does not exist"):
        check(config, tmp_path / "run")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"ctx": "a", "endings": ["ba do mi ta ru" * 9, "b"], "label": 0}), encoding="utf-8")
    config = tiny.change(tiny.run_config(shards), "eval", tasks=f"mc:{long}")
    with pytest.raises(UserError, match=r"every item of .* has an ending longer than the 16 tokens"):
        check(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_short_model_counts_what_it_leaves_out_in_rows_files_and_report(shards, tmp_path, capsys):
    rows = [{"ctx": "ba do", "endings": ["mi ta", "ru " * (20 if i < 2 else 1)], "label": 0} for i in range(6)]
    for name, which in (("some", rows), ("all", rows[:2])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in which), encoding="utf-8")
        (tmp_path / name).rename(tmp_path / f"{name}.jsonl")
    tasks = f"mc:{tmp_path / 'some.jsonl'},mc:{tmp_path / 'all.jsonl'}"
    run = tmp_path / "run"
    assert pretrain(tiny.change(tiny.run_config(shards), "eval", tasks=tasks), run) == 0
    said = capsys.readouterr().out
    assert said.count("2 of 6 items of") == 1  # once, not at every step
    found = {row["task"]: row for row in tiny.rows_of(run, "eval") if row["metric"] == "acc"}
    some, none = (found[f"mc:{tmp_path / name}"] for name in ("some.jsonl", "all.jsonl"))
    assert (some["n"], some["left_out"], none["n"], none["left_out"], none["value"]) == (4, 2, 0, 2, None)
    page = render([read_run(run)])
    assert "2 left out" in page
    assert main([str(run), "--tasks", tasks, "--device", "cpu"]) == 0
    assert "2 of 6 items of" in capsys.readouterr().out
