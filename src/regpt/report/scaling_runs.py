"""The points that a scaling law is fitted to: parameters, tokens and loss of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from regpt.errors import UserError
from regpt.report.bits import need_bits
from regpt.report.read import Row, Run, number, section
from regpt.report.series import positions
from regpt.report.summary import summarize

Which = Literal["final", "all"]
Count = Literal["total", "non-embedding"]


@dataclass(frozen=True)
class Point:
    """One validation: of which run, parameters N, tokens D, FLOPs, loss."""

    run: str
    parameters: float
    tokens: float
    flops: float
    loss: float


def points_of(runs: Sequence[Run], which: Which = "final", count: Count = "total") -> tuple[list[Point], str]:
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


def points_of_run(run: Run, key: str, which: Which, parameters: float) -> list[Point]:
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


def doubts_about(runs: Sequence[Run], which: Which) -> list[str]:
    """Why the last validations of `runs` may not be what they stand for: a sentence each."""
    ended = [(run, summarize(run)) for run in runs if which == "final"]
    return [
        f"run {run.name!r} is unfinished ({one.steps:,} of {one.planned_steps:,.0f} steps): where the learning rate "
        "decays, its loss is too high"
        for run, one in ended
        if one.planned_steps and one.steps < one.planned_steps
    ]


def parameters_of(run: Run, count: Count) -> float:
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
