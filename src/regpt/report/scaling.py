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

from regpt.errors import UserError, import_extra
from regpt.report.read import Row, RunData, number, section
from regpt.report.series import begin_of, need_bits, positions
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


# ---- the law


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, section 3.3); N parameters, D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss among those with 6·N·D = `flops` (equation 4)."""
        if self.alpha + self.beta == 0 or min(self.A, self.B, self.alpha, self.beta) <= 0:
            raise UserError(
                "the fitted law has no optimum: one of its terms vanished; add runs of other sizes or lengths"
            )
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters


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
    found = [point for run in runs for point in points_of_run(run, "bpb" if bits else "loss", which, count)]
    return found, "bits per byte" if bits else "nats per token"


def points_of_run(run: RunData, key: str, which: Which, count: Count) -> list[Point]:
    parameters = parameters_of(run, count)
    warmup = (number(section(run.config, "optim").get("warmup_steps")) or 0) if which == "all" else 0
    rows = [row for row in run.val if row["step"] > warmup and number(row.get(key)) is not None]
    if not rows:
        unit = "in bits per byte" if key == "bpb" else "loss"
        when = f"its warmup of {warmup:,.0f} steps" if warmup else "its first step"
        raise UserError(f"run {run.name!r} has no validation {unit} after {when}; leave it out")
    rows = rows if which == "all" else rows[-1:]
    places = positions(run.train, [row["step"] for row in rows], begin_of(run))
    if "tokens" not in places:
        raise UserError(f"run {run.name!r} does not say how many tokens it read; leave it out")
    found = []
    for row, read, counted in zip(rows, places["tokens"], places.get("flops", [None] * len(rows))):
        tokens = float(read or 0)
        found.append(Point(run.name, parameters, tokens, float(counted or 6 * parameters * tokens), float(row[key])))
    return found


def doubts_about(runs: Sequence[RunData], which: Which) -> list[str]:
    """A sentence for each run that may mislead: it began with trained weights, or is unfinished."""
    found = []
    for run in runs:
        source, parent = run.env.get("init_from"), section(run.env, "parent")
        if source or parent:
            origin = f"--init-from {source}" if source else f"--fork-from {parent.get('checkpoint')}"
            found.append(
                f"run {run.name!r} began with trained weights ({origin}): the law takes it as trained from scratch; "
                "leave it out"
            )
        one = summarize(run)
        if which == "final" and one.unfinished:
            found.append(
                f"run {run.name!r} is unfinished ({one.steps:,} of {one.planned_steps:,.0f} steps): where the learning "
                "rate decays, its loss is too high"
            )
    return found


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


# ---- the fit


@dataclass(frozen=True)
class ScalingFit:
    """A law, the points it was fitted to, and laws fitted to resampled points.

    Attributes:
        residual: root mean square of ln(loss) - ln(fitted loss).
        samples: laws of the bootstrap.
        warnings: reasons to doubt the law, a sentence each.
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
        noise = np.random.default_rng(1).normal(0, self.residual * widening(len(self.points)), len(guesses))
        return self.law.loss(parameters, tokens), quantiles([guess * exp(x) for guess, x in zip(guesses, noise)])


def fit(points: Sequence[Point], bootstrap: int = 200, seed: int = 0, *, more: str = "") -> ScalingFit:
    """Fit the law to `points` by the Huber loss of the logarithms, and again to `bootstrap` resamples.

    The resamples keep every point's parameters and tokens and give its fitted loss another point's residual (widened
    for the five fitted numbers): few runs on a grid leave no other way, for drawing runs would leave out sizes.

    Raises:
        UserError: too few points to determine five numbers; where numbers of tokens are missing it adds `more`, which
            gives some.
    """
    check_points(points, more)
    n, d, y = (np.log([getattr(point, key) for point in points]) for key in ("parameters", "tokens", "loss"))
    best = minimize(n, d, y, starts(n, d, y))
    fitted = log_loss(best, n, d)
    residuals, draw = y - fitted, np.random.default_rng(seed)
    drawn = (draw.choice(residuals * widening(len(points)), len(points)) for _ in range(bootstrap))
    resampled = [minimize(n, d, fitted + noise, best[None]) for noise in drawn]
    return ScalingFit(
        law=to_law(best),
        points=tuple(points),
        residual=float(np.sqrt(np.mean(residuals**2))),
        samples=tuple(map(to_law, resampled)),
        warnings=tuple(doubts([best, *resampled], points)),
    )


def widening(n: int) -> float:
    """Factor from the residuals of `n` points to the noise of single runs, for the five fitted numbers."""
    return sqrt(n / max(1, n - len(NAMES)))


def check_points(points: Sequence[Point], more: str = "") -> None:
    sizes, lengths = {point.parameters for point in points}, {point.tokens for point in points}
    if len(points) < LEAST_POINTS or min(len(sizes), len(lengths)) < LEAST_SIZES:
        raise UserError(
            f"the law has five numbers, which {len(points)} losses of {len(sizes)} model sizes and {len(lengths)} "
            f"numbers of tokens do not determine; give at least {LEAST_POINTS}, of {LEAST_SIZES} sizes and "
            f"{LEAST_SIZES} numbers of tokens{more * (len(sizes) >= LEAST_SIZES)}"
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


def log_terms(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """ln of the three terms of L for each point, (3, …, points), of coefficients (…, 5)."""
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    return np.stack(np.broadcast_arrays(a - alpha * n, b - beta * d, e))


def log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """ln L for each point, (…, points), of coefficients (…, 5)."""
    return np.logaddexp.reduce(log_terms(theta, n, d), axis=0)


def errors(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ln of the fitted loss - ln of the loss, (points,)."""
    return log_loss(theta, n, d) - y


def jacobian(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivatives of `errors`, (points, 5)."""
    of_n, of_d, of_e = np.exp(log_terms(theta, n, d) - log_loss(theta, n, d))  # each term's part of the loss
    return np.stack([of_n, of_d, of_e, -of_n * n, -of_d * d], axis=1)


def starts(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The most promising starting points, (BEST_STARTS, 5)."""
    grid = np.array(STARTS, dtype=float)
    size = np.abs(log_loss(grid, n, d) - y)
    values = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(axis=-1)
    return grid[np.argsort(values, kind="stable")[:BEST_STARTS]]


def minimize(n: np.ndarray, d: np.ndarray, y: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The best of the minima of the summed Huber losses that are reached from each row of `begin`, (5,).

    By a trust-region method for least squares, not by L-BFGS as in the paper: the valley is long and flat, and L-BFGS
    stopped in it before the minimum (Besiroglu et al. 2024).
    """
    least_squares = import_extra("scipy.optimize", "a fit needs SciPy", "report").least_squares
    how: dict[str, Any] = {"jac": jacobian, "loss": "huber", "f_scale": HUBER, "x_scale": "jac", "max_nfev": MAX_STEPS}
    low, high = (np.array(side) for side in zip(*BOUNDS))
    inside = np.clip(begin, low + 1e-3, high - 1e-3)
    found = [least_squares(errors, row, bounds=(low, high), args=(n, d, y), **how) for row in inside]
    return min(found, key=lambda one: one.cost).x


def to_law(theta: np.ndarray) -> ScalingLaw:
    a, b, e, alpha, beta = map(float, theta)
    return ScalingLaw(E=exp(e), A=exp(a), B=exp(b), alpha=alpha, beta=beta)


def quantiles(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
