"""Does the curve look healthy? Rules with stated thresholds; each finding has its reason and an advice."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt
from statistics import fmean, median
from typing import Literal

from regpt.console.text import counted
from regpt.report.read import Row, RunData, number, section
from regpt.report.series import Column, column, smooth, smoothing_span

MIN_ROWS = 20  # fewer are not judged
BLOCKS = 20  # parts of a run whose means are compared
RISE = 0.1  # nats of the last part above the lowest one that count as rising, or six standard deviations of a part
DIVERGED = 0.5  # nats
SPIKE = 0.3  # nats above the smoothed line, or eight robust standard deviations
LEARNS = 0.1  # of the loss at the start: a smaller fall is no learning
VAL_RISE = 0.01  # nats, or two standard errors of the difference
GAP = 0.3  # nats between training and validation that is worth a word
EPOCHS = 4  # repeated so often, data are nearly as good as new (Muennighoff et al. 2023)
CLIPPED = 0.5  # share of the steps
GROWTH = 5.0  # of the gradient norm, last tenth against the middle of the run
SLOW = 0.8  # of the median throughput
MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One observation. `kind` is its name for tests and scripts, `text` a clause with figures and advice."""

    level: Level
    kind: str
    text: str


@dataclass(frozen=True)
class Curve:
    """The training loss of a run: only rows whose loss is a number."""

    steps: list[int]
    raw: list[float]
    smoothed: list[float]
    means: list[float]  # of the BLOCKS equal parts of the run
    noise: float  # robust standard deviation of raw about smoothed, in the last half

    def block(self, i: int) -> tuple[int, int]:
        """First and last step of part `i`."""
        return self.steps[len(self.steps) * i // BLOCKS], self.steps[len(self.steps) * (i + 1) // BLOCKS - 1]


def examine(run: RunData) -> list[Finding]:
    """All findings, the worst first."""
    losses = column(run.train, "loss")
    known = [(row["step"], loss) for row, loss in zip(run.train, losses) if loss is not None]
    found: list[Finding] = [*not_finite(run, losses), *(Finding("note", "left out", one) for one in run.left_out)]
    if len(known) < MIN_ROWS:
        return [*found, Finding("note", "short", f"{counted(len(known), 'row')} of training loss are too few to judge")]
    curve = make_curve(known)
    for rule in (training, spikes, validation, repetition, gap, gradients, speed):
        found += rule(run, curve)
    if any(one.kind == "diverging" for one in found):  # explains what the gap would blame on the data
        found = [one for one in found if one.kind != "gap"]
    return sorted(found, key=lambda one: ("bad", "note", "good").index(one.level))


def verdict(findings: list[Finding]) -> tuple[Level, str]:
    """The sentence that stands at the top: the worst level, and why."""
    worst = findings[0].level if findings else "note"
    same = [one.text for one in findings if one.level == worst]
    if worst == "bad":
        return worst, f"Something is wrong: {'; '.join(same)}."
    if worst == "note" and any(one.kind == "short" for one in findings):
        return worst, f"It cannot be judged yet: {'; '.join(same)}."
    healthy = [one.text for one in findings if one.level == "good"]
    if worst == "note":
        return worst, f"The curve is worth a look: {'; '.join(same)}."
    return "good", f"The curve looks healthy: {'; '.join(healthy)}."


def make_curve(known: list[tuple[int, float]]) -> Curve:
    steps, raw = [step for step, _ in known], [loss for _, loss in known]
    smoothed = [value for value in smooth(raw, smoothing_span(len(raw))) if value is not None]
    late = [abs(a - b) for a, b in zip(raw, smoothed)][len(raw) // 2 :]
    edges = [len(raw) * i // BLOCKS for i in range(BLOCKS + 1)]
    means = [fmean(raw[begin:end]) for begin, end in pairwise(edges)]
    return Curve(steps, raw, smoothed, means, MAD * median(late))


# ---- the rules


def not_finite(run: RunData, losses: Column) -> Iterator[Finding]:
    bad = [row["step"] for row, loss in zip(run.train, losses) if loss is None and "loss" in row]
    if bad:
        text = f"the loss is not a number at {counted(len(bad), 'step')}, first {bad[0]:,}"
        yield Finding("bad", "not finite", text)


def training(run: RunData, curve: Curve) -> Iterator[Finding]:
    """Rising, not falling at all, or falling. Means of twentieths of the run are compared: a batch of one long
    document moves a smoothed line, too."""
    means = curve.means
    bends = [abs(means[i] - (means[i - 1] + means[i + 1]) / 2) for i in range(1, BLOCKS - 1)]
    noise = MAD * median(bends) / sqrt(1.5)  # a mean's own deviation; 1.5: the variance of such a difference
    best, at = min(means), means.index(min(means))
    rise, best_step, first, end = means[-1] - best, curve.block(at)[1], curve.raw[0], curve.smoothed[-1]
    size = number(section(run.config, "model").get("vocab_size"))
    trained = run.env.get("init_from") or run.env.get("parent")  # its weights were trained before
    from_scratch = not trained and (size is None or first > 0.8 * log(size))
    if rise > max(RISE, 6 * noise) and not validation_fell(run, best_step):
        word = "diverged" if rise > DIVERGED else "is rising"
        text = f"the training loss {word}: {best:.3f} about step {best_step:,}, {means[-1]:.3f} at the end"
        yield Finding("bad", "diverging", f"{text}; a lower optim.lr or a longer warmup usually helps")
    elif from_scratch and first - best < LEARNS * first:
        yield Finding("bad", "not learning", f"the training loss fell by {first - best:.2f} only, from {first:.2f}")
    else:
        tenth = curve.smoothed[-max(2, len(curve.smoothed) // 10)] - end
        still = f", by {tenth:.3f} over the last tenth" if tenth > 0.0005 else ", and has stopped falling"
        yield Finding("good", "falling", f"the training loss fell from {first:.2f} to {end:.3f}{still}")


def finite_losses(run: RunData) -> list[tuple[Row, float]]:
    return [(row, loss) for row in run.val if (loss := number(row.get("loss"))) is not None]


def validation_fell(run: RunData, since: int) -> bool:
    """Whether the validation loss has fallen since that step: then a training loss that rose read harder text."""
    losses = finite_losses(run)
    before = [loss for row, loss in losses if row["step"] <= since]
    return bool(before) and len(losses) > len(before) and losses[-1][1] < before[-1]


def spikes(run: RunData, curve: Curve) -> Iterator[Finding]:
    """Single rows far above the line, after the first tenth; neighbours count as one."""
    above = {i: curve.raw[i] - curve.smoothed[i - 1] for i in range(max(1, len(curve.raw) // 10), len(curve.raw))}
    high = [i for i, size in above.items() if size > max(SPIKE, 8 * curve.noise)]
    if high:
        worst, first = max(high, key=above.__getitem__), [i for i in high if i - 1 not in high]
        where = f"the largest {above[worst]:.2f} above the line at step {curve.steps[worst]:,}"
        yield Finding("note", "spikes", f"{counted(len(first), 'loss spike')}, {where}")


def validation(run: RunData, curve: Curve) -> Iterator[Finding]:
    measured = finite_losses(run)
    if len(measured) < 2:
        return
    (best_row, best), (last_row, last) = min(measured, key=lambda one: one[1]), measured[-1]
    error = sqrt(sum((number(row.get("stderr")) or 0.0) ** 2 for row in (best_row, last_row)))
    if last - best > max(VAL_RISE, 2 * error):
        then = next((i for i, step in enumerate(curve.steps) if step >= best_row["step"]), len(curve.steps) - 1)
        fell = curve.smoothed[then] - curve.smoothed[-1]
        why = f" while the training loss fell by {fell:.3f}: it overfits" if fell > 0.02 else ""
        text = f"the validation loss has risen by {last - best:.3f} since step {best_row['step']:,}{why}"
        yield Finding("bad", "validation rising", text)
    elif f"{best:.3f}" == f"{last:.3f}":
        yield Finding("good", "validation", f"the validation loss ended at its best, {last:.3f}")
    else:
        near = f"near its best, {best:.3f} at step {best_row['step']:,}"
        yield Finding("good", "validation", f"the validation loss ended at {last:.3f}, {near}")


def epochs_read(run: RunData) -> float | None:
    """Number of passes over the training data: the most read folder's count where it is known, else a quotient."""
    for row in reversed(run.events):
        if row.get("name") == "epochs" and isinstance(row.get("epochs"), dict):
            counts = [n for value in row["epochs"].values() if (n := number(value)) is not None]
            return max(counts, default=None)
    tokens = number(run.train[-1].get("tokens"))
    corpus = number(section(run.env, "data").get("train_tokens"))
    return tokens / corpus if tokens and corpus else None


def repetition(run: RunData, curve: Curve) -> Iterator[Finding]:
    epochs = epochs_read(run) or 0.0
    text = f"the training data were read {epochs:.1f} times"
    if epochs > EPOCHS:
        yield Finding("note", "repeating", f"{text}; beyond {EPOCHS} epochs repeated data teach little")
    elif epochs > 1.05:
        yield Finding("good", "repeating", f"{text}, which up to {EPOCHS} epochs is nearly as good as new data")


def gap(run: RunData, curve: Curve) -> Iterator[Finding]:
    losses = finite_losses(run)
    above = losses[-1][1] - curve.smoothed[-1] if losses else 0.0
    if above > GAP:
        text = f"validation lies {above:.2f} above training at the end"
        yield Finding("note", "gap", f"{text}: repeated data, or validation text of another kind")


def gradients(run: RunData, curve: Curve) -> Iterator[Finding]:
    """Norms that grow, or that are clipped most of the time, once warmup is over."""
    warmup = number(section(run.config, "optim").get("warmup_steps")) or 0
    norms = [norm for row in run.train if row["step"] > warmup and (norm := number(row.get("grad_norm"))) is not None]
    if len(norms) < MIN_ROWS:
        return
    middle, end = median(norms[len(norms) // 3 : 2 * len(norms) // 3]), median(norms[-max(5, len(norms) // 10) :])
    if middle > 0 and end > GROWTH * middle:
        yield Finding("bad", "gradient norm", f"the gradient norm grew from {middle:.2g} to {end:.2g}")
    clip = number(section(run.config, "train").get("grad_clip"))
    share = sum(norm > clip for norm in norms) / len(norms) if clip else 0.0
    if share > CLIPPED:
        yield Finding("note", "clipping", f"gradients were clipped in {share:.0%} of the steps after warmup")


def speed(run: RunData, curve: Curve) -> Iterator[Finding]:
    rates = [rate for rate in column(run.train, "tokens_per_s") if rate is not None]
    if len(rates) < MIN_ROWS:
        return
    usual, end = median(rates), median(rates[-max(5, len(rates) // 10) :])
    if end < SLOW * usual:
        yield Finding("note", "slower", f"the last tenth ran at {end / usual:.0%} of the usual throughput")
