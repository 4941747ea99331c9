"""Is a difference more than chance? Tests for items scored by both models, for single numbers, and against seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from types import ModuleType

import numpy as np

from regpt.errors import import_extra

LEVEL = 0.05  # a p value below it is called significant


def scipy_stats() -> ModuleType:
    """Import scipy.stats; raise a UserError where SciPy is missing."""
    return import_extra("scipy.stats", "statistics need SciPy", "report")


@dataclass(frozen=True)
class PairTest:
    """The outcome of a test of `difference` = B - A.

    Attributes:
        name: of the test.
        n: items, or None where only the two numbers and their errors were known.
        p: probability of a difference at least as large by chance alone, two-sided.
        interval: 95 % confidence interval of the difference.
    """

    name: str
    n: int | None
    difference: float
    p: float
    interval: tuple[float, float]

    @property
    def significant(self) -> bool:
        return self.p < LEVEL


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairTest:
    """Test the same items scored by both: exact McNemar where every score is 0 or 1, a paired t test otherwise."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    binary = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
    mean, interval, p = paired_t(y - x)
    if binary:
        p = mcnemar(int(((x == 1) & (y == 0)).sum()), int(((x == 0) & (y == 1)).sum()))
    return PairTest("McNemar, exact" if binary else "paired t", len(x), mean, p, interval)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p (McNemar 1947, by the binomial distribution): items that only A, only B has right."""
    if only_a + only_b == 0:
        return 1.0
    return float(scipy_stats().binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_t(differences: np.ndarray) -> tuple[float, tuple[float, float], float]:
    """Mean, 95 % interval and two-sided p (Student 1908) of independent differences."""
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / sqrt(n) if n > 1 else 0.0
    if n < 2 or error == 0.0:  # all differences are the same: a certain one, or no difference
        return mean, (mean, mean), 1.0 if mean == 0.0 or n < 2 else 0.0
    t = scipy_stats().t(n - 1)  # ttest_1samp warns of nearly equal differences
    reach = float(t.ppf(0.975)) * error
    return mean, (mean - reach, mean + reach), float(2 * t.sf(abs(mean) / error))


def unpaired_z(a: float, error_a: float, b: float, error_b: float) -> PairTest:
    """Test two numbers with standard errors. Too cautious where both come from the same items."""
    error, difference = sqrt(error_a**2 + error_b**2), b - a
    if error == 0.0:
        return PairTest("z", None, difference, 0.0 if difference else 1.0, (difference, difference))
    normal = scipy_stats().norm
    reach = float(normal.ppf(0.975)) * error
    p = float(2 * normal.sf(abs(difference) / error))
    return PairTest("z of the two errors, unpaired", None, difference, p, (difference - reach, difference + reach))


@dataclass(frozen=True)
class SeedNoise:
    """B - A next to the spread between seeds.

    Attributes:
        runs: runs of A's and of B's configuration.
        difference: mean of B's runs - mean of A's.
        deviation: standard deviation between seeds, pooled over both configurations.
        degrees: of freedom.
        p: two-sided, of a t test with that deviation (equal variances); for one run of B it is the test of whether B
            is another draw of A's distribution.
    """

    runs: tuple[int, int]
    difference: float
    deviation: float
    degrees: int
    p: float

    @property
    def exceeds(self) -> bool:
        return self.p < LEVEL


def against_seeds(a: Sequence[float], b: Sequence[float]) -> SeedNoise | None:
    """Compare the final values of runs of both configurations; None with fewer than three, which have no spread."""
    degrees = len(a) + len(b) - 2
    if not a or not b or degrees < 1:
        return None
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    squares = float(((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum())
    deviation, difference = sqrt(squares / degrees), float(y.mean() - x.mean())
    error = deviation * sqrt(1 / len(x) + 1 / len(y))
    if error == 0.0:
        p = 0.0 if difference else 1.0
    else:
        p = float(2 * scipy_stats().t(degrees).sf(abs(difference) / error))
    return SeedNoise((len(x), len(y)), difference, deviation, degrees, p)
