"""Learning rates against the lecture's function and NumPy by hand."""

import math

import pytest

from regpt.errors import UsageError
from regpt.reference import adamw
from regpt.train.config import OptimConfig
from regpt.train.schedule import make_schedule


def get_lr(it: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """The lecture's function (build-nanogpt, train_gpt2.py), in its own words; `it` counts from 0."""
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it > max_steps:
        return min_lr
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (max_lr - min_lr)


def test_the_lectures_run_has_the_lectures_rates():
    factor = make_schedule(OptimConfig(), 19073)
    ours = [OptimConfig().lr * factor(k) for k in range(1, 19074)]
    lecture = [get_lr(it, 6e-4, 6e-5, 715, 19073) for it in range(19073)]
    assert ours == pytest.approx(lecture, rel=1e-12)
    assert max(ours) == ours[714] == pytest.approx(6e-4, rel=1e-15)


@pytest.mark.parametrize(
    ("warmup_steps", "decay_steps", "steps"), [(0, None, 7), (1, None, 1), (3, 10, 25), (3, 30, 8), (5, None, 5)]
)
def test_the_length_of_the_decay_does_not_depend_on_the_length_of_the_run(warmup_steps, decay_steps, steps):
    config = OptimConfig(lr=0.3, min_lr_ratio=0.2, warmup_steps=warmup_steps, decay_steps=decay_steps)
    factor = make_schedule(config, steps)
    end = decay_steps or max(steps, warmup_steps + 1)
    for k in range(1, steps + 1):
        by_hand = adamw.lr_at(k, lr=0.3, min_lr=0.06, warmup_steps=warmup_steps, decay_steps=end)
        assert 0.3 * factor(k) == pytest.approx(by_hand, rel=1e-12)
        assert 0.3 * factor(k) == pytest.approx(get_lr(k - 1, 0.3, 0.06, warmup_steps, end), rel=1e-12)
    assert factor(end + 1) == factor(10 * end) == pytest.approx(0.2, rel=1e-12)


def test_wsd_is_constant_and_falls_linearly_at_the_end():
    factor = make_schedule(
        OptimConfig(lr=1.0, min_lr_ratio=0.2, schedule="wsd", warmup_steps=2, decay_steps=4), steps=10
    )
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [factor(k) for k in range(1, 11)] == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_over_a_tenth_of_the_run_unless_told_otherwise():
    factor = make_schedule(OptimConfig(lr=1.0, min_lr_ratio=0.0, schedule="wsd", warmup_steps=0), steps=200)
    assert factor(180) == 1
    assert factor(181) == pytest.approx(0.95)
    assert factor(200) == 0


def test_constant_is_constant_after_the_warmup():
    factor = make_schedule(OptimConfig(lr=1.0, schedule="constant", warmup_steps=4), steps=10)
    assert [factor(k) for k in range(1, 11)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            OptimConfig(warmup_steps=10, decay_steps=10),
            r"decay_steps is 10 but the warmup takes 10.* above 10",
        ),
        (
            OptimConfig(schedule="wsd", warmup_steps=90, decay_steps=20),
            r"warmup_steps 90 and optim\.decay_steps 20 are together more than the 100 steps.*shorten one",
        ),
    ],
)
def test_a_decay_that_begins_before_the_warmup_ends_is_refused(config: OptimConfig, sentence: str):
    with pytest.raises(UsageError, match=sentence):
        make_schedule(config, 100)
