"""What each batch of a validation gave is kept, for runs to be compared by."""

import json

import pytest

import tiny
from regpt.runs.pretrain import pretrain


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def validated(config, run):
    """The last row of metrics of the validation, and its items."""
    rows = rows_of(run / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "val"][-1], rows_of(run / "evals" / "val-step-00000008.jsonl")


def train_on(config, run):
    """In a process of several: one run of all of them."""
    assert pretrain(config, run) == 0


def test_the_batches_of_the_last_validation_make_up_its_loss(tmp_path):
    config = tiny.run_config(tiny.write_shards(tmp_path / "data"))
    assert pretrain(config, tmp_path / "run") == 0
    row, items = validated(config, tmp_path / "run")
    assert [one["item"] for one in items] == ["rows 0-0", "rows 1-1", "rows 2-2"]
    assert sum(one["loss"] for one in items) / 3 == pytest.approx(row["loss"])
    assert [path.name for path in (tmp_path / "run" / "evals").iterdir()] == ["val-step-00000008.jsonl"]


def test_processes_put_their_batches_together(tmp_path):
    config = tiny.run_config(tiny.write_shards(tmp_path / "data"))
    tiny.in_processes(2, train_on, config, tmp_path / "run")
    row, items = validated(config, tmp_path / "run")
    assert sorted(one["item"] for one in items) == ["rows 0-0", "rows 1-1", "rows 2-2"]
    assert sum(one["loss"] for one in items) / 3 == pytest.approx(row["loss"], rel=1e-5)
