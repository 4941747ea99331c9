"""What the report says of a curve: each fault is found, and curves without it are left in peace."""

import random
from math import exp

import pytest
from run_files import train_row, val_row

from regpt.report.health import examine, verdict
from regpt.report.read import read_run
from regpt.report.summary import sentence, summarize

STEPS = 400
CONFIG = "[model]\nvocab_size = 50257\n[optim]\nwarmup_steps = 20\n[train]\ngrad_clip = 1.0\n"


def curve(step: int) -> float:
    """A training loss as they are: from ln 50257 down, ever more slowly."""
    return 4.0 + 4.8 * exp(-step / 15) + 2.0 * exp(-step / 150)


def rows_of(loss, noise=0.02, **columns):
    draw = random.Random(0)
    made = []
    for step in range(1, STEPS + 1):
        more = {key: values(step) for key, values in columns.items()}
        made.append(train_row(step, loss=loss(step) + draw.gauss(0, noise), grad_norm=0.5) | more)
    return made


def kinds(make_run, rows, env=None, config=CONFIG):
    env = {"data": {"train_tokens": 10_000_000}} if env is None else env
    return {one.kind: one for one in examine(read_run(make_run(rows=rows, env=env, config=config)))}


def test_a_usual_curve_is_healthy_and_says_why(make_run):
    vals = [val_row(step, curve(step) + 0.1) for step in range(0, STEPS + 1, 50)]
    run = read_run(make_run(rows=[*rows_of(curve), *vals], env={}, config=CONFIG))
    level, said = verdict(examine(run))
    assert level == "good"
    assert said.startswith("The curve looks healthy: the training loss fell from 10.")
    assert "validation loss ended at its best, 4.2" in said


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_fault(make_run, noise, seed):
    draw = random.Random(seed)
    found = kinds(make_run, rows_of(lambda step: curve(step) + draw.gauss(0, noise)))
    assert {one.level for one in found.values()} == {"good"}


def test_a_loss_that_rises_has_diverged(make_run):
    found = kinds(make_run, rows_of(lambda step: curve(step) + max(0, step - 300) * 0.02))
    assert found["diverging"].level == "bad"
    assert "at the end" in found["diverging"].text


def test_a_run_that_diverged_is_not_told_to_look_for_repeated_data(make_run):
    rows = rows_of(lambda step: curve(step) + max(0, step - 300) * 0.02)
    assert "gap" in kinds(make_run, [*rows_of(curve), val_row(STEPS, 9.0)])
    found = kinds(lambda **given: make_run(**given, name="other"), [*rows, val_row(100, 6.0), val_row(STEPS, 9.0)])
    assert {"diverging", "validation rising"} <= found.keys()
    assert "gap" not in found


def test_a_rising_training_loss_is_no_fault_while_validation_falls(make_run):
    vals = [val_row(step, curve(step)) for step in range(0, STEPS + 1, 20)]
    rows = rows_of(lambda step: curve(step) + max(0, step - 300) * 0.004)
    assert "diverging" in kinds(make_run, rows)
    assert "diverging" not in kinds(lambda **given: make_run(**given, name="other"), [*rows, *vals])


def test_a_loss_that_became_nan_is_named_with_its_step(make_run):
    found = kinds(make_run, [*rows_of(curve)[:300], *(train_row(step, loss=float("nan")) for step in range(301, 311))])
    assert found["not finite"].level == "bad"
    assert "10 steps, first 301" in found["not finite"].text


def test_a_loss_that_hardly_falls_does_not_learn(make_run):
    assert kinds(make_run, rows_of(lambda step: 10.8 - step / 1000))["not learning"].level == "bad"


def test_fine_tuning_starts_low_and_may_fall_little(make_run):
    assert "not learning" not in kinds(make_run, rows_of(lambda step: 3.0 - step / 4000))


@pytest.mark.parametrize("env", [{"init_from": "gpt2"}, {"parent": {"checkpoint": "runs/a", "step": 80}}])
def test_a_run_that_begins_with_learned_weights_may_fall_little_from_any_loss(make_run, env):
    assert "not learning" not in kinds(make_run, rows_of(lambda step: 10.8 - step / 1000), env)


def test_a_rising_validation_loss_overfits(make_run):
    vals = [val_row(step, 4.5 + abs(step - 200) / 400) for step in range(0, STEPS + 1, 50)]
    found = kinds(make_run, [*rows_of(curve), *vals])
    assert found["validation rising"].level == "bad"
    assert "by 0.500 since step 200" in found["validation rising"].text
    assert "overfits" in found["validation rising"].text


@pytest.mark.parametrize(
    ("last", "said", "best"),
    [
        (3.0004, "ended at its best, 3.000", False),  # the same number for a reader
        (3.005, "ended at 3.005, near its best, 3.000 at step 350", True),
    ],
)
def test_the_best_validation_loss_is_one_number_in_the_whole_report(make_run, last, said, best):
    vals = [val_row(0, 8.0), val_row(350, 3.0), val_row(STEPS, last)]
    run = read_run(make_run(rows=[*rows_of(curve), *vals], env={}, config=CONFIG))
    assert said in "".join(one.text for one in examine(run))
    assert ("with the best" in sentence(summarize(run))) == best


def test_a_validation_loss_within_its_error_does_not_rise(make_run):
    vals = [val_row(step, 4.5 + (0.02 if step == STEPS else 0)) | {"stderr": 0.02} for step in (0, 200, STEPS)]
    assert "validation rising" not in kinds(make_run, [*rows_of(curve), *vals])
    exact = [row | {"stderr": 0.001} for row in vals]
    other = kinds(lambda **given: make_run(**given, name="other"), [*rows_of(curve), *exact])
    assert "validation rising" in other


@pytest.mark.parametrize(("train_tokens", "level"), [(400_000, None), (200_000, "good"), (50_000, "note")])
def test_repeated_data_are_counted(make_run, train_tokens, level):
    found = kinds(make_run, rows_of(curve), env={"data": {"train_tokens": train_tokens}})
    assert ("repeating" in found) == (level is not None)
    if level:
        assert found["repeating"].level == level
        assert f"read {1024 * STEPS / train_tokens:.1f} times" in found["repeating"].text


def test_the_most_repeated_folder_counts(make_run):
    event = {"kind": "event", "step": STEPS, "name": "epochs", "epochs": {"a": 0.5, "b": 7.25}}
    assert "read 7.2 times" in kinds(make_run, [*rows_of(curve), event])["repeating"].text


def test_a_gap_to_validation_is_noted(make_run):
    found = kinds(make_run, [*rows_of(curve), val_row(0, 9.0), val_row(STEPS, 5.0)])
    assert "validation lies 0.8" in found["gap"].text


def test_a_growing_gradient_norm_is_bad_and_constant_clipping_a_note(make_run):
    found = kinds(make_run, rows_of(curve, grad_norm=lambda step: 0.5 if step < 350 else 0.5 * 1.1 ** (step - 350)))
    assert found["gradient norm"].level == "bad"
    clipped = kinds(
        lambda **given: make_run(**given, name="other"), rows_of(curve, grad_norm=lambda step: 1.0 + step % 3)
    )
    assert "in 67% of the steps" in clipped["clipping"].text


def test_single_spikes_are_counted_once_each(make_run):
    rows = rows_of(lambda step: curve(step) + (2.0 if step in (200, 201, 300) else 0))
    assert kinds(make_run, rows)["spikes"].text.startswith("2 loss spikes, the largest 2.")


def test_a_run_that_became_slow_is_noted(make_run):
    found = kinds(make_run, rows_of(curve, tokens_per_s=lambda step: 1000.0 if step < 300 else 200.0))
    assert found["slower"].text == "the last tenth ran at 20% of the usual throughput"


def test_few_rows_are_not_judged(make_run):
    found = examine(read_run(make_run(rows=rows_of(curve)[:5])))
    assert verdict(found) == ("note", "It cannot be judged yet: 5 rows of training loss are too few to judge.")


def test_the_worst_finding_speaks_first(make_run):
    rows = rows_of(
        lambda step: curve(step) + max(0, step - 300) * 0.02, tokens_per_s=lambda step: 2.0 if step < 300 else 1
    )
    found = examine(read_run(make_run(rows=rows, env={}, config=CONFIG)))
    assert [one.level for one in found] == sorted((one.level for one in found), key=("bad", "note", "good").index)
    assert verdict(found)[1].startswith("Something is wrong: the training loss diverged")
