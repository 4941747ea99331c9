"""A run in one sentence and a row of figures."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from statistics import median
from typing import Any

from regpt.console.text import counted, duration, figure, si, split_si
from regpt.report.read import RunData, number, section
from regpt.report.series import begin_of, column, smooth, smoothing_span, training_seconds


@dataclass(frozen=True)
class Tile:
    """One figure of the header: label, value with its unit, notes."""

    label: str
    value: str
    unit: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """The figures of a run; None where they are unknown."""

    steps: int
    planned_steps: float | None
    tokens: float | None
    parameters: float | None
    seconds: float | None
    device: str | None
    train_loss: float | None
    first_val: tuple[int, float] | None  # (step, loss)
    last_val: tuple[int, float] | None
    best_val: tuple[int, float] | None
    last_bpb: float | None
    unigram_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    peak_memory_gib: float | None

    @property
    def unfinished(self) -> bool:
        return self.planned_steps is not None and self.steps < self.planned_steps


def summarize(run: RunData) -> RunSummary:
    """The figures of `run`, from every row, not from the thinned ones."""
    val = [(row["step"], loss) for row in run.val if (loss := number(row.get("loss"))) is not None]
    seconds = training_seconds(run.train, begin_of(run)["step"])
    smoothed = [loss for loss in smooth(column(run.train, "loss"), smoothing_span(len(run.train))) if loss is not None]
    return RunSummary(
        steps=run.train[-1]["step"],
        planned_steps=number(section(run.config, "train").get("steps")),
        tokens=number(run.train[-1].get("tokens")),
        parameters=number(run.env.get("parameters")),
        seconds=None if seconds is None else float(seconds[-1]),
        device=device_name(run.env),
        train_loss=smoothed[-1] if smoothed else None,
        first_val=val[0] if val else None,
        last_val=val[-1] if val else None,
        best_val=min(val, key=lambda point: point[1]) if val else None,
        last_bpb=number(run.val[-1].get("bpb")) if val else None,
        unigram_loss=number(run.env.get("unigram_loss")),
        tokens_per_s=middle(present(run, "tokens_per_s")),
        mfu=middle(present(run, "mfu")),
        peak_memory_gib=max(present(run, "peak_memory_gib"), default=None),
    )


def present(run: RunData, key: str) -> list[float]:
    return [value for value in column(run.train, key) if value is not None]


def middle(values: list[float]) -> float | None:
    """The median, which a slow first step (compilation) does not move; None of nothing."""
    return median(values) if values else None


def device_name(env: dict[str, Any]) -> str | None:
    """`NVIDIA H100`, `8 × NVIDIA H100` for more processes than one, `CPU with 1 thread`."""
    device, world_size = env.get("device"), number(env.get("world_size")) or 1
    if not isinstance(device, str) or not device:
        return None
    device = re.sub(r"^cpu\b", "CPU", re.sub(r"\b1 threads$", "1 thread", device))
    return device if world_size == 1 else f"{world_size:.0f} × {device}"


def sentence(summary: RunSummary) -> str:
    """Return the run in one sentence, for a reader who reads nothing else."""
    model = "A model" if summary.parameters is None else f"A model of {si(summary.parameters)} parameters"
    verb = "made " if summary.tokens is None else f"read {si(summary.tokens)} tokens in "
    parts = [f"{model} {verb}{counted(summary.steps, 'step')}"]
    if summary.planned_steps and summary.unfinished:
        parts.append(f" of {summary.planned_steps:,}")
    if summary.seconds is not None:
        parts.append(f" and {duration(summary.seconds)}")
    if summary.device:
        parts.append(f" on {summary.device}")
    return "".join(parts) + outcome(summary) + "."


def outcome(summary: RunSummary) -> str:
    """The clauses of the sentence about losses."""
    if summary.first_val is None or summary.last_val is None or summary.best_val is None:
        return "" if summary.train_loss is None else f"; its training loss ended at {loss(summary.train_loss)}"
    text = "; its validation loss "
    if summary.last_val == summary.first_val:
        text += f"is {loss(summary.last_val[1])}"
    else:
        text += f"went from {loss(summary.first_val[1])} to {loss(summary.last_val[1])}"
    if loss(summary.best_val[1]) != loss(summary.last_val[1]):
        text += f", with the best, {loss(summary.best_val[1])}, at step {summary.best_val[0]:,}"
    if summary.unigram_loss is not None:
        text += f"; a unigram model would reach {loss(summary.unigram_loss)}"
    return text


def tiles(summary: RunSummary, config: dict[str, Any]) -> Iterator[Tile]:
    """The figures of the header, the most wanted first; those the run does not hold are left out."""
    train, last = summary.train_loss, summary.last_val
    if summary.best_val is not None and last is not None:
        step, best = summary.best_val
        notes = [f"perplexity {figure(exp(min(best, 700)))}"]  # exp overflows soon after
        if step != last[0]:
            notes.append(f"at step {step:,}; last {loss(last[1])}")
        elif summary.last_bpb is not None:
            notes.append(f"{summary.last_bpb:.3f} bits per byte")
        yield Tile("Best validation loss", loss(best), "", tuple(notes))
    if train is not None:
        gap = () if last is None else (f"gap to validation {last[1] - train:+.3f}",)
        yield Tile("Final training loss", loss(train), "", ("smoothed", *gap))
    if summary.parameters is not None:
        model = section(config, "model")
        shape = [f"{model[key]} {word}" for key, word in (("n_layer", "layers"), ("n_head", "heads")) if key in model]
        width = [f"width {model['n_embd']}"] if "n_embd" in model else []
        yield Tile("Parameters", *split_si(summary.parameters), (", ".join(shape), *width))
    if summary.tokens is None:
        yield Tile("Steps", f"{summary.steps:,}")
    else:
        batch_tokens = number(section(config, "train").get("batch_tokens"))
        ramp = section(config, "train").get("batch_ramp")
        each = [f"{batch_tokens:,} tokens each{', at first' if ramp else ''}"] if batch_tokens else []
        yield Tile("Tokens", *split_si(summary.tokens), (counted(summary.steps, "step"), *each))
    if summary.tokens_per_s is not None:
        notes = [] if summary.mfu is None else [f"MFU {100 * summary.mfu:.1f} %"]
        notes += [] if summary.peak_memory_gib is None else [f"{summary.peak_memory_gib:.1f} GiB at most"]
        value, prefix = split_si(summary.tokens_per_s)
        yield Tile("Throughput", value, f"{prefix} tokens/s".strip(), tuple(notes) or ("median of the steps",))
    if summary.seconds is not None:
        yield Tile("Time in training", duration(summary.seconds), "", (summary.device,) if summary.device else ())


def loss(value: float) -> str:
    """A loss in nats per token, as papers print it."""
    return f"{value:.3f}"
