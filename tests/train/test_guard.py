"""Which steps are refused: judged by numbers alone."""

import json
import math
import random

import pytest

from regpt.train.config import TrainConfig
from regpt.train.guard import LEAST, WINDOW, Guard

NAN, INF = math.nan, math.inf


def warmed_up(steps: int = WINDOW, **keys) -> Guard:
    """After `steps` updates with losses of mean 3 and standard deviation 0.1."""
    guard, draw = Guard(TrainConfig(**keys)), random.Random(1)
    for step in range(steps):
        guard.note_update(step + 1, draw.gauss(3.0, 0.1))
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (3.0, NAN), (3.0, INF), (-INF, 1.0)])
def test_what_is_not_finite_is_never_applied(loss: float, norm: float):
    verdict = Guard(TrainConfig(on_non_finite="rewind")).judge(0, loss, norm)
    assert verdict is not None
    assert (verdict.name, verdict.policy) == ("non_finite", "rewind")


def test_the_score_counts_standard_deviations_of_normal_losses():
    assert warmed_up().score(3.5) == pytest.approx(5.0, rel=0.15)
    assert warmed_up().score(2.5) == pytest.approx(-5.0, rel=0.15)


def test_a_spike_is_recorded_and_an_ordinary_loss_is_not():
    guard = warmed_up()
    assert guard.judge(WINDOW, 3.3, 1.0) is None
    verdict = guard.judge(WINDOW, 4.0, 1.0)
    assert verdict is not None
    assert (verdict.name, verdict.policy, verdict.again) == ("spike", "record", False)
    assert warmed_up(spike_score=0.0).judge(WINDOW, 400.0, 1.0) is None


def test_one_outlier_in_the_window_hides_no_spike():
    """As it would with mean and standard deviation."""
    guard = warmed_up()
    guard.note_update(WINDOW + 1, 50.0)
    assert guard.judge(WINDOW + 1, 4.0, 1.0) is not None


def test_few_losses_make_no_spike():
    assert warmed_up(LEAST - 1).judge(LEAST - 1, 400.0, 1.0) is None
    assert warmed_up(LEAST).judge(LEAST, 400.0, 1.0) is not None


def test_losses_without_any_scatter_make_no_spike_of_a_last_digit():
    guard = Guard(TrainConfig())
    for step in range(WINDOW):
        guard.note_update(step + 1, 3.0)
    assert guard.judge(WINDOW, 3.001, 1.0) is None


def test_losses_of_zero_are_losses():
    """One batch that is known by heart, or a corpus of one token."""
    guard = Guard(TrainConfig())
    for step in range(WINDOW):
        guard.note_update(step + 1, 0.0)
    assert guard.score(0.0) == 0
    assert guard.judge(WINDOW, 0.0, 0.0) is None
    assert guard.judge(WINDOW, 1e-6, 1.0) is None
    assert guard.judge(WINDOW, 0.5, 1.0) is not None
    assert math.isfinite(guard.score(0.5))


def test_without_a_score_nothing_is_scored(monkeypatch):
    monkeypatch.setattr(Guard, "score", lambda *_: pytest.fail("scored"))
    assert warmed_up(spike_score=0.0).judge(WINDOW, 400.0, 1.0) is None


@pytest.mark.parametrize("spiked", [False, True])
def test_a_loss_of_exactly_the_score_is_no_spike(spiked: bool):
    loss = 4.0
    score = warmed_up().score(loss)
    bound = math.nextafter(score, 0) if spiked else score
    assert (warmed_up(spike_score=bound).judge(WINDOW, loss, 1.0) is not None) == spiked


def test_only_so_many_are_refused_in_a_row():
    guard = Guard(TrainConfig(on_non_finite="skip", max_refused=2))
    assert [guard.judge(5, NAN, 1.0).policy for _ in range(3)] == ["skip", "skip", "stop"]  # type: ignore[union-attr]
    guard = Guard(TrainConfig(on_non_finite="skip", max_refused=2))
    for updates in range(5):  # an update between any two
        verdict = guard.judge(updates, NAN, 1.0)
        assert verdict is not None
        assert verdict.policy == "skip"
        guard.note_update(updates + 1, 3.0)


def test_an_update_before_the_place_of_a_refusal_does_not_end_the_row():
    """A rewound run makes good updates until it comes back to the place."""
    guard = Guard(TrainConfig(on_non_finite="rewind", max_refused=1))
    assert guard.judge(10, NAN, 1.0).policy == "rewind"  # type: ignore[union-attr]
    for updates in range(6, 11):  # up to the place itself
        guard.note_update(updates, 3.0)
    assert guard.judge(10, NAN, 1.0).policy == "stop"  # type: ignore[union-attr]
    guard = Guard(guard.config)
    assert guard.judge(10, NAN, 1.0).policy == "rewind"  # type: ignore[union-attr]
    for updates in range(6, 12):  # and beyond
        guard.note_update(updates, 3.0)
    assert guard.judge(12, NAN, 1.0).policy == "rewind"  # type: ignore[union-attr]


@pytest.mark.parametrize("furthest", [10, 12])
def test_the_furthest_refusal_counts_not_the_last(furthest: int):
    """Rewound from 12, refused at 10 on the way: the row ends after 12 only."""
    guard = Guard(TrainConfig(on_non_finite="rewind", max_refused=2))
    assert [guard.judge(updates, NAN, 1.0).policy for updates in (12, 10)] == ["rewind"] * 2  # type: ignore[union-attr]
    guard.note_update(furthest, 3.0)
    assert guard.judge(furthest, NAN, 1.0).policy == "stop"  # type: ignore[union-attr]


def test_a_spike_right_after_a_spike_is_again_one():
    guard = warmed_up()
    assert [guard.judge(WINDOW + i, 9.0, 1.0).again for i in (0, 1, 3)] == [False, True, False]  # type: ignore[union-attr]


def test_after_as_many_skipped_spikes_the_level_is_taken_as_the_new_one():
    guard = warmed_up(on_spike="skip", max_refused=2)
    policies = [guard.judge(WINDOW, 9.0, 1.0).policy for _ in range(3)]  # type: ignore[union-attr]
    assert policies == ["skip", "skip", "record"]


def test_the_state_is_json_and_all_there_is():
    guard = warmed_up(on_spike="skip", max_refused=1)
    guard.judge(WINDOW, 9.0, 1.0)
    again = Guard(guard.config)
    again.load_state(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert again.score(3.21) == guard.score(3.21)
    assert again.judge(WINDOW, 9.0, 1.0) == guard.judge(WINDOW, 9.0, 1.0)
