"""Shards, metrics and evaluations from Python."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import regpt
from regpt.__main__ import main

TEXT = "\n".join(f"the {word} of the {other} is a {word}" for word in ("cat", "dog", "owl") for other in "abcdefg") * 9


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_prepare_writes_what_the_command_does(text: Path, tmp_path: Path):
    tokenizer = regpt.train_tokenizer(text, 270, tmp_path / "tokenizer")
    manifest = regpt.prepare(text, tmp_path / "a", tokenizer=tokenizer, val_fraction=0.2)
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--val-fraction", "0.2"]
    assert main(["data", "prepare", str(text), "--out", str(tmp_path / "b"), *options]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert manifest.tokens("train") > manifest.tokens("val") > 0
    named = regpt.prepare([str(text)], tmp_path / "c", tokenizer=tmp_path / "tokenizer")
    assert named.tokenizer_sha256 == tokenizer.sha256


def test_a_tokenizer_needs_no_folder_and_takes_no_used_one(text: Path, tmp_path: Path):
    assert regpt.train_tokenizer([text], 260).decode(regpt.train_tokenizer(text, 260).encode("the cat")) == "the cat"
    regpt.train_tokenizer(text, 260, tmp_path)
    with pytest.raises(regpt.UserError, match="exists already"):
        regpt.train_tokenizer(text, 260, tmp_path)
    with pytest.raises(regpt.UsageError, match="no source"):
        regpt.train_tokenizer([], 260)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dedup": "near"}, "prepare has no option 'dedup'"),
        ({"sepparator": "x"}, "did you mean 'separator'"),
        ({"encoder": "slow"}, "encoder is 'slow', must be one of 'auto', 'exact'"),
        ({"include": "*.txt"}, "must be a list of text"),
        ({"val_fraction": "0.1"}, "must be a number or None"),
        ({"tokenizer": 5}, "must be text, a path or a Tokenizer"),
        ({"filters": {"dedup": "nearly"}}, "did you mean 'near'"),
        ({"filters": {"dedupe": "near"}}, "did you mean 'dedup'"),
        ({"val": [5]}, "a source is 5"),
    ],
)
def test_options_that_prepare_does_not_take_are_refused(text: Path, tmp_path: Path, options: dict, said: str):
    with pytest.raises(regpt.UsageError, match=said):
        regpt.prepare(text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_home_folder_is_found_by_its_sign(text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(text.parent))
    monkeypatch.chdir(tmp_path)
    assert regpt.prepare("~/text.txt", "~/out", tokenizer=regpt.train_tokenizer(["~/text.txt"], 270)).tokens("val")
    assert (text.parent / "out" / "manifest.json").is_file()
    assert not list(tmp_path.iterdir())


def test_filters_may_be_a_dict_and_sources_any_iterable(text: Path, tmp_path: Path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "the cat"}\n' * 3 + '{"text": "the dog"}\n', encoding="utf-8")
    options = {"tokenizer": regpt.train_tokenizer(text, 270), "filters": {"dedup": "exact"}, "val_fraction": 0}
    assert regpt.prepare(iter([lines]), tmp_path / "out", **options).documents("train") == 2


def test_metrics_are_arrays_by_kind_and_column(straight: Path):
    run = regpt.read_run(straight)
    train, val = run.metrics["train"], run.metrics["val"]
    assert train["step"].tolist() == list(range(1, 9))
    assert train["step"].dtype == np.int64
    assert train["loss"].dtype == np.float64
    assert val["step"].tolist() == [0, 3, 6, 8]
    assert (train.rows, val.rows, run.metrics["eval"].rows) == (8, 4, 0)
    assert "kind" not in train
    assert run.config.train.steps == 8
    assert Path(run) == straight
    assert [sample["step"] for sample in run.samples][-1] == 8
    assert "step 8 of 8" in repr(run)


def test_missing_values_are_nan_and_text_stays_text():
    from regpt.api.metrics import table

    found = table([{"kind": "x", "step": 1, "a": 1}, {"kind": "x", "step": 2, "a": None, "name": "b", "on": True}])
    assert np.isnan(found["a"][1])
    assert found["name"].tolist() == [None, "b"]
    assert found["on"].dtype == object


def test_a_frame_holds_the_same(straight: Path):
    run = regpt.read_run(straight)
    frame = pd.DataFrame(run.metrics["val"])
    assert frame["loss"].to_numpy().tolist() == run.metrics["val"]["loss"].tolist()
    assert len(pd.DataFrame(run.metrics["train"])) == 8


def test_a_typo_names_the_nearest(straight: Path, tmp_path: Path):
    run = regpt.read_run(straight)
    with pytest.raises(regpt.UsageError, match="did you mean 'train'"):
        run.metrics["trian"]
    with pytest.raises(regpt.UsageError, match="did you mean 'loss'"):
        run.metrics["train"]["los"]
    with pytest.raises(regpt.UserError, match="does not exist"):
        regpt.read_run(tmp_path / "nothing")


def test_evaluate_gives_the_numbers_of_the_command(straight: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"query": "ba", "choices": ["do", "mi"], "gold": 0}\n', encoding="utf-8")
    tasks = ["val", f"mc:{questions}"]
    assert main(["eval", str(straight), "--tasks", ",".join(tasks), "--json", str(report), "--device", "cpu"]) == 0
    import json

    theirs = json.loads(report.read_text(encoding="utf-8"))["tasks"]
    rows = regpt.evaluate(regpt.read_run(straight), tasks, device="cpu")
    values = {(row["task"], row["metric"]): row["value"] for row in rows}
    assert values["val", "loss"] == theirs["val"]["loss"]
    assert values["val", "bpb"] == theirs["val"]["bpb"]
    assert values[tasks[1], "acc"] == theirs[tasks[1]]["metrics"]["acc"]["value"]
    assert {"task", "metric", "value", "stderr", "n"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": "vall"}, "did you mean 'val'"),
        ({"max_item": 3}, "did you mean 'max_items'"),
        ({"precision": "fp33"}, "did you mean 'fp32'"),
        ({"device": "gpu"}, "is not available"),
    ],
)
def test_an_evaluation_that_cannot_be_meant_is_refused(straight: Path, options: dict, said: str):
    with pytest.raises(regpt.UsageError, match=said):
        regpt.evaluate(straight, **options)


def test_an_empty_path_is_not_the_present_folder(text: Path, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    before = [*tmp_path.iterdir()]
    with pytest.raises(regpt.UsageError, match="out is empty, must be text or a path"):
        regpt.prepare(text, "", tokenizer="bytes")
    with pytest.raises(regpt.UsageError, match="out is empty"):
        regpt.train_tokenizer(text, 260, "")
    assert [*tmp_path.iterdir()] == before
