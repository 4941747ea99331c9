"""Reading a run folder."""

import json
import math

import pytest
from run_files import train_row, val_row, write_rows

from regpt.__main__ import main
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
    assert [row["step"] for row in read_rows(path)[0]] == [1]
    assert read_rows(path)[1] == []


BAD = {
    "half an object": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[1]",
    "no step": b'{"kind":"train"}',
    "a step that is a boolean": b'{"step":true}',
    "a step that is text": b'{"step":"3"}',
    "a step that is a fraction": b'{"step":3.0}',
    "a negative step": b'{"step":-1}',
    "a step of 300 digits": b'{"step":1' + b"0" * 300 + b"}",
    "a step of 5,000 digits": b'{"step":1' + b"0" * 5000 + b"}",
    "a step beyond 64 bits": b'{"step":9223372036854775808}',
    "brackets": b"[" * 200_000,
    "brackets in a row": b'{"step":1,"x":' + b"[" * 500 + b"]" * 500 + b"}",
    "a loss that is text": b'{"kind":"train","step":1,"loss":"3"}',
    "tokens without end": b'{"kind":"train","step":1,"tokens":1' + b"0" * 30 + b"}",
    "a number of missing tasks": b'{"kind":"eval","step":1,"task":"core","metric":"centered","value":1,"missing":5}',
    "a kind that is a list": b'{"kind":[],"step":1}',
    "a time that is an object": b'{"kind":"event","name":"resume","step":1,"time":{}}',
    "a prompt that is a list": b'{"step":1,"prompt":["a"],"texts":[]}',
    "texts that are a number": b'{"step":1,"prompt":"a","texts":5}',
    "a loss that is a boolean": b'{"kind":"train","step":1,"loss":true}',
    "a loss that is the text NaN": b'{"kind":"val","step":1,"loss":"NaN"}',
    "training without a loss": b'{"kind":"train","step":1,"tokens":5}',
    "an evaluation without a task": b'{"kind":"eval","step":1,"metric":"acc","value":0.5}',
    "an event without a name": b'{"kind":"event","step":1}',
    "neither a kind nor texts": b'{"step":1,"loss":1.0}',
    "more steps than there can be": b'{"kind":"train","step":4000000000000000000,"loss":1.0}',
    "a line of 20 MB": b'{"step":1,"x":"' + b"a" * 20_000_000 + b'"}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_line_that_is_no_row_is_left_out_and_said(tmp_path, capsys, bad):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(train_row(step)).encode() for step in (1, 2)]
    path.write_bytes(b"\n".join([good[0], bad, good[1], b""]))
    rows, said = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert said == [f"line 2 of {path} is no row and was left out"]
    path.write_bytes(b"\n".join([*[bad] * 2, good[0], good[1], b""]))
    assert len(read_rows(path)[0]) == 2
    assert capsys.readouterr().err.endswith(
        f"regpt: warning: 2 lines of {path} are no rows and were left out, the first is line 1\n"
    )


def test_an_event_of_an_update_that_was_not_finite_is_a_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    event = {"kind": "event", "name": "non_finite", "step": 1, "loss": "nan", "grad_norm": "inf"}
    path.write_text(json.dumps(event) + "\n", encoding="utf-8")
    assert read_rows(path) == ([event], [])


def test_reports_comparisons_and_laws_of_runs_with_odd_rows_say_so(make_run, capsys, tmp_path):
    odd, plain = make_run(name="odd"), make_run(name="plain")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (odd / name).open("ab") as file:
            file.write(b"\n".join(BAD.values()) + b"\n")
    assert main(["report", str(odd)]) == 0
    assert f"{len(BAD)} lines of " in (odd / "report.html").read_text(encoding="utf-8")
    assert main(["diff", str(odd), str(plain)]) == 0
    assert capsys.readouterr().err.count(f"warning: {len(BAD)} lines of ") == 4


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "texts": ["a\u2028b\x85c"]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path)[0][0]["texts"] == ["a\u2028b\x85c"]


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
