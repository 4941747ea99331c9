"""Rows as columns over a common x axis, in a common unit: smoothed, thinned, placed."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import log

import numpy as np

from regpt.errors import UserError
from regpt.ranges import evenly
from regpt.report.read import Row, RunData, number, section

Column = list[float | None]

MAX_POINTS = 2000  # per series: more than a wide screen has pixels for
MAX_SAMPLE_STEPS = 100
TUNED = ("chosen", "rejected", "margin", "reward", "reply_tokens", "entropy", "max_delta_logp")
TRAIN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gib", *TUNED)
LEAST_EVEN = "the least even layer"  # of a mixture of experts
SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "mfu")  # also the ones whose extremes survive thinning


def column(rows: Iterable[Row], key: str) -> Column:
    return [number(row.get(key)) for row in rows]


def smooth(values: Sequence[float | None], span: int) -> Column:
    """Exponential moving average with weight 2 / (span + 1) for the newest value, None where `values` is.

    The span grows with the values seen, from 1 to at most `span`, an eighth of them in between: the steep start of a
    training curve is followed without lag.
    """
    smoothed: Column = []
    mean, seen = 0.0, 0
    for value in values:
        if value is not None:
            reach = min(span, 1 + seen / 8)
            mean += (value - mean) * 2 / (reach + 1)
            seen += 1
        smoothed.append(None if value is None else mean)
    return smoothed


def smoothing_span(rows: int) -> int:
    """Rows that the smoothed lines average over: a twenty-fifth of the run, between 2 and 200."""
    return min(200, max(2, rows // 25))


def thin(columns: Sequence[Sequence[float | None]], limit: int) -> list[int]:
    """At most `limit` row numbers, ascending, that keep the shape of every column.

    The first tenth of `limit` stays whole, for a logarithmic axis. What follows is cut into equal buckets; from each
    stay the rows at which a column has its minimum or maximum, so a single spike survives. The last row always stays.
    """
    n = len(columns[0])
    if n <= limit:
        return list(range(n))
    head = limit // 10
    buckets = max(1, (limit - head - 1) // (2 * len(columns)))
    edges = [head + (n - head) * i // buckets for i in range(buckets + 1)]
    kept = {*range(head), n - 1}
    for begin, end in pairwise(edges):
        for values in columns:
            there = [(value, i) for i in range(begin, end) if (value := values[i]) is not None]
            if there:
                kept |= {min(there)[1], max(there)[1]}
    return sorted(kept)


def training_seconds(train: Sequence[Row], begin: int = 0) -> np.ndarray | None:
    """Time spent in training steps up to each row, (rows,), of a run that begins after step `begin`; None when no row
    has `dt_ms`.

    Not the wall clock: pauses between a stop and a resume, evaluation and saving do not count.
    """
    dt_ms = column(train, "dt_ms")
    known = [value for value in dt_ms if value is not None]
    if not known:
        return None
    filled = np.array([np.median(known) if value is None else value for value in dt_ms])
    steps = np.diff([begin, *(row["step"] for row in train)])  # a row stands for the steps before it
    return np.cumsum(filled * steps) / 1000


def begin_of(run: RunData) -> Row:
    """Steps, tokens and FLOPs before the first update: those of the checkpoint that a fork begins with."""
    return next((row for row in run.events if row.get("name") == "fork"), {"step": 0})


def positions(train: Sequence[Row], steps: Sequence[int], begin: Row | None = None) -> dict[str, Column]:
    """Positions of `steps` on the x axes the rows allow, `step`, `tokens`, `flops`, `seconds`; linear between rows, of
    a run that begins at `begin`."""
    begin = begin or {"step": 0}
    known = np.array([begin["step"], *(row["step"] for row in train)], dtype=float)
    axes: dict[str, Column] = {"step": list(steps)}
    for axis in ("tokens", "flops"):
        counted = [value for value in column(train, axis) if value is not None]
        if len(counted) == len(train):
            before = number(begin.get(axis))
            if before is None:  # a fork by a version that did not record them
                before = counted[0] * begin["step"] / train[0]["step"] if train else 0
            placed = np.interp(steps, known, np.maximum.accumulate(np.array([before, *counted], dtype=float)))
            axes[axis] = [round(x) for x in placed] if axis == "tokens" else [short(float(x)) for x in placed]
    seconds = training_seconds(train, begin["step"])
    if seconds is not None:
        axes["seconds"] = [short(x) for x in np.interp(steps, known, np.concatenate([[0], seconds]))]
    return axes


def build_table(run: RunData, limit: int = MAX_POINTS) -> tuple[dict[str, Column], dict[str, Column]]:
    """The x axes and the columns of every chart, all of one length, on the union of the steps kept.

    Columns: those of `TRAIN_COLUMNS` that hold anything, `<name>_smooth`, and those of `measurements`. Smoothing
    happens before thinning, on every row.
    """
    columns = {key: column(run.train, key) for key in TRAIN_COLUMNS}
    span = smoothing_span(len(run.train))
    rows = thin([columns[key] for key in SMOOTHED], limit)
    columns |= {f"{key}_smooth": smooth(columns[key], span) for key in SMOOTHED}
    series = {key: {run.train[i]["step"]: values[i] for i in rows} for key, values in columns.items()}
    for key, measured in measurements(run).items():
        steps = list(measured)
        series[key] = {steps[i]: measured[steps[i]] for i in thin([list(measured.values())], limit // 2)}
    steps = sorted(set().union(*series.values()))
    table = {key: [short(values.get(step)) for step in steps] for key, values in series.items()}
    return positions(run.train, steps, begin_of(run)), {
        key: values for key, values in table.items() if any(x is not None for x in values)
    }


def measurements(run: RunData) -> dict[str, dict[int, float | None]]:
    """Step → value of everything that is measured at some steps only.

    Columns: `val_loss`, `val_bpb`, `val_loss_ema`, `val_bpb_ema`, `val:<source>`,
    `eval:<task>/<metric>`, `updates` for all matrices together, `updates:<kind>` for those of one kind.
    """
    found: dict[str, dict[int, float | None]] = {
        f"val_{key}": {row["step"]: number(row.get(key)) for row in run.val}
        for key in ("loss", "bpb", "loss_ema", "bpb_ema")
    }
    for row in run.train:
        if loads := loads_of(row):
            found.setdefault(f"expert_load:{LEAST_EVEN}", {})[row["step"]] = max(loads)
            found.setdefault("expert_load:mean of layers", {})[row["step"]] = sum(loads) / len(loads)
    for row in run.val_sources:
        found.setdefault(f"val:{row['source']}", {})[row["step"]] = number(row.get("loss"))
    for row in run.evals:
        found.setdefault(f"eval:{row.get('task')}/{row.get('metric')}", {})[row["step"]] = number(row.get("value"))
    for row in run.updates:
        found.setdefault("updates", {})[row["step"]] = number(row.get("ratio"))
        ratios = row.get("ratios")
        for kind, value in ratios.items() if isinstance(ratios, dict) else ():
            found.setdefault(f"updates:{kind}", {})[row["step"]] = number(value)
    return found


def loads_of(row: Row) -> list[float]:
    """Largest over mean load of the experts of each layer; empty without experts."""
    loads = row.get("expert_load")
    found = [number(one) for one in loads] if isinstance(loads, list) else []
    return [one for one in found if one is not None]


def thin_samples(samples: Sequence[Row], limit: int = MAX_SAMPLE_STEPS) -> list[Row]:
    """The rows of at most `limit` steps, evenly spaced, the first and the last among them."""
    kept = set(evenly(sorted({row["step"] for row in samples}), limit))
    return [row for row in samples if row["step"] in kept]


def short(value: float | None) -> float | None:
    """Six significant digits: more than a chart can show, half the bytes."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


# ---- one unit for losses of different tokenizers: bits per byte of text


def same_tokenizer(a: RunData, b: RunData) -> bool:
    """Whether losses in nats per token of the two runs can be compared.

    By the tokenizer's hash where both runs recorded it, else by its name and the size of the vocabulary.
    """
    ours, theirs = section(a.env, "data"), section(b.env, "data")
    if ours.get("tokenizer_sha256") and theirs.get("tokenizer_sha256"):
        return ours["tokenizer_sha256"] == theirs["tokenizer_sha256"]
    same_size = section(a.config, "model").get("vocab_size") == section(b.config, "model").get("vocab_size")
    return ours.get("tokenizer") == theirs.get("tokenizer") and same_size


def need_bits(runs: Sequence[RunData]) -> bool:
    """Whether the runs have different tokenizers, so that only bits per byte can be compared.

    Raises:
        UserError: they do, and one of them has no bits per byte.
    """
    if all(same_tokenizer(a, b) for a, b in pairwise(runs)):
        return False
    for run in runs:
        if bytes_per_token(run) is None:
            other = next(one.name for one in runs if not same_tokenizer(one, run))
            raise UserError(
                f"the runs {run.name!r} and {other!r} have different tokenizers, so their losses can only be compared "
                f"in bits per byte, and {run.name!r} has none; leave it out, or validate it once (eval.every_steps)"
            )
    return True


def bytes_per_token(run: RunData) -> float | None:
    """UTF-8 bytes a token of the training text; of the validation text where that is unknown."""
    data = section(run.env, "data")
    n_bytes, tokens = number(data.get("train_bytes")), number(data.get("train_tokens"))
    if n_bytes and tokens:
        return n_bytes / tokens
    for row in reversed(run.val):
        loss, bpb = number(row.get("loss")), number(row.get("bpb"))
        if loss and bpb:
            return loss / (log(2) * bpb)
    return None


def to_bits(nats_per_token: float | None, bytes_per_token: float) -> float | None:
    return None if nats_per_token is None else nats_per_token / (log(2) * bytes_per_token)
