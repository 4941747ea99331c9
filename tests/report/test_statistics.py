"""Tests of differences, against the formulas by hand and SciPy's own procedures."""

from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from regpt.report.statistics import against_seeds, mcnemar, paired_test, unpaired_z


def mcnemar_by_hand(b: int, c: int) -> float:
    """Twice the smaller tail of Binomial(b + c, 1/2), at most 1."""
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 9), (9, 1), (5, 5), (40, 60), (480, 520)])
def test_mcnemar_is_the_binomial_tail_of_the_items_that_only_one_has_right(b, c):
    assert mcnemar(b, c) == pytest.approx(mcnemar_by_hand(b, c), rel=1e-9)


def test_scores_of_zero_and_one_are_tested_exactly():
    a = [1] * 30 + [0] * 20 + [1] * 5 + [0] * 17
    b = [1] * 30 + [0] * 20 + [0] * 5 + [1] * 17
    found = paired_test(a, b)
    assert (found.name, found.n, found.difference) == ("McNemar, exact", 72, pytest.approx(12 / 72))
    assert found.p == pytest.approx(mcnemar_by_hand(5, 17))
    assert found.significant


def test_other_scores_are_tested_by_their_differences():
    rng = np.random.default_rng(0)
    a = rng.normal(3.0, 1.0, 200)
    b = a - 0.02 + rng.normal(0, 0.1, 200)
    found, expected = paired_test(a.tolist(), b.tolist()), stats.ttest_rel(b, a)
    assert found.name == "paired t"
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    # The items differ by far more than the models: without pairing nothing would be seen.
    assert found.significant
    assert stats.ttest_ind(a, b).pvalue > 0.5


def test_equal_scores_are_no_difference_and_a_constant_one_is_certain():
    assert paired_test([0.5, 1.5], [0.5, 1.5]).p == 1.0
    assert paired_test([0.5, 1.5], [0.6, 1.6]).p == pytest.approx(0.0, abs=1e-6)
    assert paired_test([0.5], [0.7]).p == 1.0


def test_two_numbers_with_errors_are_a_z_test():
    found = unpaired_z(0.30, 0.004, 0.31, 0.003)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.01 / 0.005))
    assert found.interval == pytest.approx((0.01 - 1.959964 * 0.005, 0.01 + 1.959964 * 0.005))
    assert unpaired_z(0.3, 0.0, 0.3, 0.0).p == 1.0


def test_groups_of_seeds_are_compared_by_their_pooled_spread():
    a, b = [3.30, 3.31, 3.29, 3.305], [3.27, 3.28, 3.26]
    found, expected = against_seeds(a, b), stats.ttest_ind(b, a)
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.runs, found.degrees) == ((4, 3), 5)
    assert found.exceeds


def test_one_run_is_compared_with_the_spread_of_the_other_s_seeds():
    a, b = [3.30, 3.31, 3.29], [3.27]
    found = against_seeds(a, b)
    assert found is not None
    assert found.deviation == pytest.approx(np.std(a, ddof=1))
    t = (3.27 - 3.30) / (0.01 * sqrt(1 + 1 / 3))
    assert found.p == pytest.approx(2 * stats.t(2).sf(abs(t)))
    assert not found.exceeds  # three seeds tell little: 2.6 deviations are not enough


def test_two_runs_have_no_spread():
    assert against_seeds([3.3], [3.2]) is None
    assert against_seeds([], [3.2, 3.3, 3.4]) is None
