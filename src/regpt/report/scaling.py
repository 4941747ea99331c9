"""How loss depends on parameters and tokens: a power law fitted to runs, its uncertainty and its predictions.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, section 3.3, equation 2): E is the entropy of the text,
the other terms are the loss due to the finite model and to the finite data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, sqrt
from typing import Any, Literal

import numpy as np

from regpt.errors import UserError
from regpt.report.read import Row, RunData, number, section
from regpt.report.scaling_law import ScalingLaw
from regpt.report.series import need_bits, positions
from regpt.report.summary import summarize

HUBER = 1e-3  # Hoffmann et al. 2022, appendix D.3, of log losses
# Starting points of Hoffmann et al. 2022, appendix D.3: a = ln A, b = ln B, e = ln E, alpha, beta.
STARTS = tuple(
    product(range(0, 26, 5), range(0, 26, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5))
)
BEST_STARTS = 12  # of the 4,500, by their value: the others end in the same minima, or worse ones
BOUNDS = ((-10.0, 60.0), (-10.0, 60.0), (-10.0, 5.0), (0.0, 3.0), (0.0, 3.0))
MAX_STEPS = 200  # of one minimization; twenty are usual
EDGE = 0.01  # of a coefficient's range: nearer to its end it was held back
LEAST_POINTS, LEAST_SIZES = 6, 3
LEVEL = 0.95
NAMES = ("E", "A", "B", "alpha", "beta")
IN_ORDER = ("A", "B", "E", "alpha", "beta")  # of the fitted coefficients
Which = Literal["final", "all"]
Count = Literal["total", "non-embedding"]


# ---- the points: parameters, tokens and loss of runs


@dataclass(frozen=True)
class Point:
    """One validation: of which run, parameters N, tokens D, FLOPs, loss."""

    run: str
    parameters: float
    tokens: float
    flops: float
    loss: float


def points_of(runs: Sequence[RunData], which: Which = "final", count: Count = "total") -> tuple[list[Point], str]:
    """Points of `runs`, and the unit of their losses: bits per byte where the tokenizers differ.

    `which`: the last validation of each run, or all of them after the warmup. `count`: all parameters, or those that
    are no embeddings.

    Raises:
        UserError: a run without validation, parameters or tokens.
    """
    bits = need_bits(runs)
    key = "bpb" if bits else "loss"
    found = [point for run in runs for point in points_of_run(run, key, which, parameters_of(run, count))]
    return found, "bits per byte" if bits else "nats per token"


def points_of_run(run: RunData, key: str, which: Which, parameters: float) -> list[Point]:
    warmup = number(section(run.config, "optim").get("warmup_steps")) or 0
    rows = [row for row in run.val if row["step"] > 0 and number(row.get(key)) is not None]
    if which == "all":
        rows = [row for row in rows if row["step"] > warmup]
    if not rows:
        what = "in bits per byte" if key == "bpb" else "loss"
        when = f"its warmup of {warmup:,.0f} steps" if which == "all" and warmup else "its first step"
        raise UserError(f"run {run.name!r} has no validation {what} after {when}; leave it out")
    rows = rows if which == "all" else rows[-1:]
    places = positions(run.train, [row["step"] for row in rows])
    if "tokens" not in places:
        raise UserError(f"run {run.name!r} does not say how many tokens it read; leave it out")
    found = []
    for i, row in enumerate(rows):
        tokens = float(places["tokens"][i] or 0)
        flops = float((places["flops"][i] if "flops" in places else None) or 6 * parameters * tokens)
        found.append(Point(run.name, parameters, tokens, flops, float(row[key])))
    return found


def doubts_about(runs: Sequence[RunData], which: Which) -> list[str]:
    """A sentence for each run that may mislead: it began with trained weights, or is unfinished."""
    ended = [(run, summarize(run)) for run in runs if which == "final"]
    return [
        f"run {run.name!r} began with trained weights ({origin}): the law takes it as trained from scratch; leave "
        "it out"
        for run in runs
        if (origin := origin_of(run))
    ] + [
        f"run {run.name!r} is unfinished ({one.steps:,} of {one.planned_steps:,.0f} steps): where the learning rate "
        "decays, its loss is too high"
        for run, one in ended
        if one.planned_steps and one.steps < one.planned_steps
    ]


def origin_of(run: RunData) -> str:
    """The flag that gave the run trained weights, and their model; empty where it began with random ones."""
    if source := run.env.get("init_from"):
        return f"--init-from {source}"
    parent = run.env.get("parent")
    return f"--fork-from {parent.get('checkpoint')}" if isinstance(parent, dict) else ""


def parameters_of(run: RunData, count: Count) -> float:
    """Parameters by env.json; without the embeddings of tokens and positions by config.toml."""
    total = number(run.env.get("parameters"))
    if total is None:
        raise UserError(f"run {run.name!r} does not say how many parameters it has (env.json); leave it out")
    if count == "total":
        return total
    model = section(run.config, "model")
    if any(number(model.get(key)) is None for key in ("vocab_size", "max_seq_len", "n_embd")):
        raise UserError(f"the shape of run {run.name!r} is not known (config.toml), so neither are its embeddings")
    return non_embedding(total, model)


def non_embedding(total: float, model: Row) -> float:
    """`total` without the embeddings of tokens (twice, where the head is not tied to them) and learned positions."""
    positions = model["max_seq_len"] if model.get("position", "learned") == "learned" else 0
    tables = 1 if model.get("tie_embeddings", True) else 2
    return total - (tables * model["vocab_size"] + positions) * model["n_embd"]


# ---- the law


@dataclass(frozen=True)
class ScalingFit:
    """A law, the points it was fitted to, and laws fitted to resampled points.

    Attributes:
        residual: root mean square of ln(loss) - ln(fitted loss).
        samples: laws of the bootstrap; empty when there is no uncertainty to tell.
        warnings: why the law should be doubted, a sentence each.
    """

    law: ScalingLaw
    points: tuple[Point, ...]
    residual: float
    samples: tuple[ScalingLaw, ...]
    warnings: tuple[str, ...]

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % of the bootstrap's values of a coefficient."""
        return quantiles([getattr(law, name) for law in self.samples])

    def predict(self, parameters: float, tokens: float) -> tuple[float, tuple[float, float] | None]:
        """The loss of a run, with the interval in which 95 % of such runs would end.

        Each of the bootstrap's laws is one guess at the law; the residuals are what runs add to it.
        """
        guesses = [law.loss(parameters, tokens) for law in self.samples]
        spread = self.residual * sqrt(len(self.points) / max(1, len(self.points) - len(NAMES)))
        noise = np.random.default_rng(1).normal(0, spread, len(guesses))
        return self.law.loss(parameters, tokens), quantiles([guess * exp(x) for guess, x in zip(guesses, noise)])


def fit(points: Sequence[Point], bootstrap: int = 200, seed: int = 0) -> ScalingFit:
    """Fit the law to `points` by the Huber loss of the logarithms, and again to `bootstrap` resamples.

    The resamples keep every point's parameters and tokens and give its fitted loss another point's residual (widened
    for the five fitted numbers): few runs on a grid leave no other way, for drawing runs would leave out sizes.

    Raises:
        UserError: too few points to determine five numbers.
    """
    check_points(points)
    n, d, y = (np.log([getattr(point, key) for point in points]) for key in ("parameters", "tokens", "loss"))
    best = minimize(n, d, y, starts(n, d, y))
    fitted = log_loss(best, n, d)
    residuals = y - fitted
    widened = residuals * sqrt(len(points) / max(1, len(points) - len(NAMES)))
    draw = np.random.default_rng(seed)
    resampled = [minimize(n, d, fitted + draw.choice(widened, len(points)), best[None]) for _ in range(bootstrap)]
    law = to_law(best)
    return ScalingFit(
        law=law,
        points=tuple(points),
        residual=float(np.sqrt(np.mean(residuals**2))),
        samples=tuple(to_law(one) for one in resampled),
        warnings=tuple(doubts([best, *resampled], points)),
    )


def check_points(points: Sequence[Point]) -> None:
    sizes, lengths = {point.parameters for point in points}, {point.tokens for point in points}
    if len(points) < LEAST_POINTS or min(len(sizes), len(lengths)) < LEAST_SIZES:
        raise UserError(
            f"the law has five numbers, which {len(points)} losses of {len(sizes)} model sizes and {len(lengths)} "
            f"numbers of tokens do not determine; give at least {LEAST_POINTS}, of {LEAST_SIZES} sizes and "
            f"{LEAST_SIZES} numbers of tokens, or use every validation of the runs with --points all"
        )


def doubts(fits: Sequence[np.ndarray], points: Sequence[Point]) -> list[str]:
    """Reasons to doubt the fit, the first of `fits`, whose others are the bootstrap's."""
    low, high = (np.array(side) for side in zip(*BOUNDS))
    share = (np.array(fits) - low) / (high - low)  # (fits, 5): where in its range each coefficient ended
    held = (share < EDGE) | (share > 1 - EDGE)
    loose = [name for name, first, rest in zip(IN_ORDER, held[0], held.mean(axis=0)) if first or rest > (1 - LEVEL) / 2]
    found = [f"the runs do not determine {', '.join(loose)}: the edge of what was tried is as likely"] if loose else []
    for key, what in (("parameters", "model sizes"), ("tokens", "numbers of tokens")):
        values = [getattr(point, key) for point in points]
        if max(values) < 4 * min(values):
            found.append(f"the {what} differ by less than a factor of four")
    return found


# ---- the minimisation


def log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """ln L for each point, (…, points), of coefficients (…, 5)."""
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(a - alpha * n, b - beta * d, e))
    return np.logaddexp.reduce(terms, axis=0)


def errors(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ln of the fitted loss - ln of the loss, (points,)."""
    return log_loss(theta, n, d) - y


def jacobian(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivatives of `errors`, (points, 5)."""
    a, b, e, alpha, beta = theta
    terms = np.stack(np.broadcast_arrays(a - alpha * n, b - beta * d, e))
    share = np.exp(terms - np.logaddexp.reduce(terms, axis=0))  # (3, points): each term's part of the loss
    return np.stack([share[0], share[1], share[2], -share[0] * n, -share[1] * d], axis=1)


def huber(error: np.ndarray) -> np.ndarray:
    size = np.abs(error)
    return np.where(size <= HUBER, error**2 / 2, HUBER * (size - HUBER / 2))


def starts(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The most promising starting points, (BEST_STARTS, 5)."""
    grid = np.array(STARTS, dtype=float)
    values = huber(log_loss(grid, n, d) - y).sum(axis=-1)
    return grid[np.argsort(values, kind="stable")[:BEST_STARTS]]


def minimize(n: np.ndarray, d: np.ndarray, y: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The best of the minima of the summed Huber losses that are reached from each row of `begin`, (5,).

    By a trust-region method for least squares, not by L-BFGS as in the paper: the valley is long and flat, and L-BFGS
    stopped in it before the minimum (Besiroglu et al. 2024).
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise UserError("a fit needs SciPy; install it with: pip install 'regpt[report]'") from None
    how: dict[str, Any] = {"jac": jacobian, "loss": "huber", "f_scale": HUBER, "x_scale": "jac", "args": (n, d, y)}
    how |= {"max_nfev": MAX_STEPS}
    low, high = (np.array(side) for side in zip(*BOUNDS))
    inside = np.clip(begin, low + 1e-3, high - 1e-3)
    found = [least_squares(errors, row, bounds=(low, high), **how) for row in inside]
    return min(found, key=lambda one: one.cost).x


def to_law(theta: np.ndarray) -> ScalingLaw:
    a, b, e, alpha, beta = map(float, theta)
    return ScalingLaw(E=exp(e), A=exp(a), B=exp(b), alpha=alpha, beta=beta)


def quantiles(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
