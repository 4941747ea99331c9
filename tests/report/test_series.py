"""Columns: smoothed, thinned and placed on the axes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import train_row, val_row

from regpt.report.read import read_run
from regpt.report.series import (
    build_table,
    positions,
    smooth,
    thin,
    thin_samples,
    training_seconds,
)


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
    assert axes.pop("flops") == [0, 1e10, 1.5e10, 2e10]
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


def test_rows_of_one_source_are_not_the_whole_validation(make_run):
    whole, part = val_row(1, 3.0), {**val_row(1, 5.0), "source": "books"}
    run = read_run(make_run(rows=[train_row(1), whole, part]))
    assert (run.val, run.val_sources) == ([whole], [part])
    assert build_table(run)[1]["val:books"] == [5.0]


def test_update_ratios_are_columns(make_run):
    updates = {"kind": "updates", "step": 1, "ratio": 1e-3, "ratios": {"wte": 2e-3, "mlp.c_fc": None}}
    columns = build_table(read_run(make_run(rows=[train_row(1), updates])))[1]
    assert (columns["updates"], columns["updates:wte"]) == ([1e-3], [2e-3])
    assert "updates:mlp.c_fc" not in columns


def test_samples_are_thinned_evenly_with_both_ends():
    rows = [{"step": step, "texts": []} for step in range(1000)]
    kept = [row["step"] for row in thin_samples(rows, limit=10)]
    assert kept == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]


def test_loads_of_experts_are_the_largest_and_the_mean_of_the_layers(make_run):
    loads = {1: [1.5, 2.5], 2: [1.0, "x", True, 3.0], 3: "damaged"}
    run = make_run(rows=[train_row(step, expert_load=load) for step, load in loads.items()])
    _, columns = build_table(read_run(run))
    assert columns["expert_load:the least even layer"] == [2.5, 3.0, None]
    assert columns["expert_load:mean of layers"] == [2.0, 2.0, None]


def test_a_fork_begins_where_its_checkpoint_stands_on_every_axis():
    rows = [train_row(21, tokens=2624, flops=2.6e9, dt_ms=100.0), train_row(22, tokens=2688, flops=2.7e9, dt_ms=100.0)]
    begin = {"step": 20, "tokens": 2560, "flops": 2.5e9}
    axes = positions(rows, [20, 21, 22], begin)
    assert axes["tokens"] == [2560, 2624, 2688]
    assert axes["flops"] == [2.5e9, 2.6e9, 2.7e9]
    assert axes["seconds"] == pytest.approx([0, 0.1, 0.2])  # its own: not twenty-one steps as slow as the first


def test_a_fork_of_before_its_tokens_were_recorded_has_read_in_proportion():
    assert positions([train_row(21, tokens=2100)], [20, 21], {"step": 20})["tokens"] == [2000, 2100]
