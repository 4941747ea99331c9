"""Text for fixed prompts while a model trains."""

import json

import pytest

import tiny
from regpt.config import read_config
from regpt.errors import UsageError, UserError
from regpt.runs import actions
from regpt.runs.pretrain import check, pretrain


def test_every_prompt_is_continued_every_time(shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "sample", more_prompts=("do mi", "ta"), n=2)
    assert pretrain(config, tmp_path / "run") == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (s, p) for s in (0, 4, 8) for p in ("ba bo", "do mi", "ta")
    ]
    assert all(len(row["texts"]) == 2 and text.startswith(row["prompt"]) for row in rows for text in row["texts"])
    assert read_config(str(tmp_path / "run" / "config.toml")).sample.prompts == ("ba bo", "do mi", "ta")


def test_one_prompt_more_changes_nothing_else(shards, tmp_path):
    for name, more in (("one", ()), ("two", ("ta",))):
        config = tiny.change(tiny.run_config(shards), "sample", more_prompts=more)
        assert pretrain(config, tmp_path / name) == 0
    one, two = ((tmp_path / name / "samples.jsonl").read_text(encoding="utf-8").splitlines() for name in ("one", "two"))
    first = [json.loads(line)["texts"] for line in one]
    assert first == [json.loads(line)["texts"] for line in two if '"ba bo"' in line]


def test_prompts_that_cannot_be_continued_are_refused(shards, tmp_path):
    with pytest.raises(UsageError, match="names a prompt twice"):
        tiny.change(tiny.run_config(shards), "sample", more_prompts=("ba bo",))
    config = tiny.change(tiny.run_config(shards), "sample", more_prompts=("ba do mi ta ru ke " * 9,))
    with pytest.raises(UserError):
        check(config, tmp_path / "run")


@pytest.mark.parametrize("error", [UserError("the model's logits are not finite"), MemoryError()])
def test_a_text_that_cannot_be_sampled_ends_no_run(shards, tmp_path, monkeypatch, capsys, error):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(actions, "write_samples", fail)
    assert pretrain(tiny.run_config(shards), tmp_path / "run") == 0
    assert "no sample after step 8: " in capsys.readouterr().out
