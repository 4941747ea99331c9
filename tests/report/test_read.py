"""Reading a run folder."""

import json
import math

import pytest
from run_files import train_row, val_row, write_rows

from regpt.errors import UserError
from regpt.report.read import latest, number, read_rows, read_run


def test_the_last_row_of_a_step_counts_after_a_resume():
    rows = [
        train_row(1),
        train_row(2, loss=9.0),
        train_row(3, loss=9.0),
        train_row(2, loss=1.0),
        train_row(3, loss=2.0),
    ]
    assert [(row["step"], row["loss"]) for row in latest(rows)] == [(1, 8.0), (2, 1.0), (3, 2.0)]


def test_two_tasks_of_one_step_are_two_rows(make_run):
    rows = [
        {"kind": "eval", "step": 1, "task": task, "metric": "acc", "value": v}
        for task, v in (("a", 1), ("b", 2), ("a", 3))
    ]
    run = read_run(make_run(rows=[train_row(1), *rows]))
    assert [(row["task"], row["value"]) for row in run.evals] == [("a", 3), ("b", 2)]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(train_row(1)).encode() + b'\n{"kind":"train","st\xc3')
    assert [row["step"] for row in read_rows(path)] == [1]


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe{}", b"[1]", b'{"kind":"train"}', b'{"step":true}', b'{"step":"3"}'])
def test_an_unreadable_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(train_row(1)).encode()
    path.write_bytes(b"\n".join([good, bad, good, b""]))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 "):
        read_rows(path)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "texts": ["a\u2028b\x85c"]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path)[0]["texts"] == ["a\u2028b\x85c"]


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_folder_without_metrics_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)


def test_metrics_without_a_train_row_are_one_sentence(make_run):
    with pytest.raises(UserError, match="no row of kind 'train'"):
        read_run(make_run(rows=[val_row(0, 8.0)]))


@pytest.mark.parametrize(
    ("name", "content"), [("config.toml", "a = "), ("env.json", "{"), ("env.json", "[1]"), ("env.json", "\xff")]
)
def test_an_unreadable_document_is_named(make_run, name, content):
    folder = make_run()
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=name):
        read_run(folder)


def test_only_metrics_are_required(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [train_row(1)])
    run = read_run(tmp_path)
    assert (run.config, run.env, run.samples, run.val) == ({}, {}, [], [])


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, [1]])
def test_what_is_no_finite_number_is_a_gap(value):
    assert number(value) is None
