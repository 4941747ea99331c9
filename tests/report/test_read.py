"""Reading, thinning and smoothing a run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import train_row, val_row, write_rows

from regpt.errors import UserError
from regpt.report.read import (
    build_table,
    latest,
    number,
    positions,
    read_rows,
    read_run,
    smooth,
    thin,
    thin_samples,
    training_seconds,
)


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


@given(st.lists(st.none() | st.floats(-100, 100), min_size=1, max_size=50))
def test_a_smoothed_line_stays_within_what_it_averages(values):
    seen = []
    for value, mean in zip(values, smooth(values, 5), strict=True):
        assert (value is None) == (mean is None)
        if value is not None and mean is not None:
            seen.append(value)
            assert min(seen) - 1e-9 <= mean <= max(seen) + 1e-9


def test_a_smoothed_line_has_the_weights_of_its_span():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    expected, mean = [], 0.0
    for i, value in enumerate(values):  # the recurrence, written as the weighted mean it is
        weight = 2 / (min(10, 1 + i / 8) + 1)
        mean = (1 - weight) * mean + weight * value
        expected.append(mean)
    np.testing.assert_allclose(smooth(values.tolist(), 10), expected, rtol=1e-9)
    tail = np.std(smooth(values.tolist(), 10)[100:])
    assert tail == pytest.approx(np.sqrt(1 / 10), rel=0.25)  # an EMA of span n has 1/n of white noise's variance


@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(20, 60))
def test_thinning_keeps_extremes_ends_and_the_limit(values, limit):
    kept = thin([values, values[::-1]], limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(limit, 0) or len(values) <= limit
    assert {0, len(values) - 1} <= set(kept)
    known = [value for value in values if value is not None]
    if known:
        assert {min(known), max(known)} <= {values[i] for i in kept}


def test_a_short_series_is_not_thinned():
    assert thin([[1.0, 2.0, 3.0]], 3) == [0, 1, 2]


def test_training_time_ignores_pauses_and_counts_the_steps_between_rows():
    rows = [train_row(10, dt_ms=100.0), train_row(20, dt_ms=200.0, time=9e9)]
    seconds = training_seconds(rows)
    assert seconds is not None
    assert seconds.tolist() == pytest.approx([1.0, 3.0])


def test_a_run_without_timings_has_no_time_axis():
    assert training_seconds([train_row(1, dt_ms=None)]) is None
    assert "seconds" not in positions([train_row(1, dt_ms=None)], [1])


def test_steps_between_rows_lie_between_them_on_every_axis():
    axes = positions([train_row(10), train_row(20)], [0, 10, 15, 20])
    assert axes == {"step": [0, 10, 15, 20], "tokens": [0, 10240, 15360, 20480], "seconds": [0, 5, 7.5, 10]}


def test_a_long_run_keeps_its_single_spike_and_every_validation(make_run):
    rows = [train_row(step, grad_norm=77.0 if step == 4321 else 1.0) for step in range(1, 5001)]
    run = read_run(make_run(rows=[*rows, *(val_row(step, 4.0) for step in range(0, 5001, 100))]))
    axes, columns = build_table(run, limit=500)
    assert len(axes["step"]) <= 500 + 51
    assert columns["grad_norm"][axes["step"].index(4321)] == 77.0
    assert sum(value is not None for value in columns["val_loss"]) == 51
    assert {len(values) for values in [*axes.values(), *columns.values()]} == {len(axes["step"])}
    assert "mfu" not in columns


def test_samples_are_thinned_evenly_with_both_ends():
    rows = [{"step": step, "texts": []} for step in range(1000)]
    kept = [row["step"] for row in thin_samples(rows, limit=10)]
    assert kept == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
