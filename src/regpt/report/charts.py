"""The data of the page's script: the columns of one run or several, and the panels that draw them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regpt.report.markup import printable
from regpt.report.read import Row, RunData, number, section
from regpt.report.series import (
    LEAST_EVEN,
    MAX_POINTS,
    Column,
    begin_of,
    build_table,
    bytes_per_token,
    need_bits,
    positions,
    short,
    thin_samples,
    to_bits,
)

MAX_TEXT = 4000  # characters of one sample
MAX_EVENTS = 500
UNMARKED = ("checkpoint", "epochs")  # events that happen in every run: listed, not marked in the charts
MAX_SOURCES = 8  # lines of one chart
ACCURACIES = ("acc", "acc_norm", "centered")  # metrics of one task that share a chart
OF_AVERAGE = "_ema"  # after a name: measured with the moving average of the weights
LECTURE = "measured in the lecture “Let's reproduce GPT-2 (124M)” (build-nanogpt) and its notebook"
GPT3 = "Brown et al. 2020, appendix H, zero-shot"
FINEWEB_EDU = re.compile(r"fineweb[-_]?edu|edu[-_]?fineweb", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """A horizontal line in a chart: label, height, source ("" for the run itself)."""

    label: str
    value: float
    source: str = ""


GPT2_ON_FINEWEB_EDU = Reference("GPT-2 124M", 3.2924, f"validation loss on FineWeb-Edu, {LECTURE}")
TASKS = {
    ("hellaswag", "acc_norm"): (
        Reference("chance", 0.25, "four endings an item"),
        Reference("GPT-2 124M", 0.2955, LECTURE),
        Reference("GPT-3 124M", 0.337, GPT3),
        Reference("GPT-2 1558M", 0.489, LECTURE),
    ),
}
CHANCE_IN_CORE = Reference("chance", 0.0, "the definition of centred accuracy")
USUAL_UPDATE = Reference("usual with Adam", 1e-3, "a rule of thumb: updates of a thousandth of the weights")


@dataclass(frozen=True)
class Line:
    """One line of a chart: a column of one run.

    Attributes:
        role: how it is drawn: `raw` thin and pale, `line`, `points`.
        column: its name in the run's table.
        label: its name in the legend.
        hue: a colour of the style sheet: `train`, `val`, or a number of the palette.
        run: which run it belongs to.
    """

    role: str
    column: str
    label: str
    hue: str | int
    run: int = 0


@dataclass(frozen=True)
class Panel:
    """One chart. `form` is the format of its values, `note` a line of text under it."""

    title: str
    unit: str
    form: str
    lines: Sequence[Line]
    references: Sequence[Reference] = ()
    log: bool = False
    note: str = ""


UPDATES = Panel("Update to weight", "‖Δw‖ / ‖w‖ of a step", "rate", (), (USUAL_UPDATE,), log=True)


Table = dict[str, Column]  # the columns of one run


def charts(runs: Sequence[RunData]) -> Row:
    """The data of report.js: each run's columns, the panels that draw them, events and samples."""
    bits = need_bits(runs)
    tables = [run_table(run, len(runs), bits) for run in runs]
    shown = [
        {"name": printable(run.name), "axes": axes, "columns": columns, "events": events(run), "samples": samples(run)}
        for run, (axes, columns) in zip(runs, tables)
    ]
    return {"runs": shown, "panels": [panel_row(panel) for panel in panels(runs, [table for _, table in tables], bits)]}


def run_table(run: RunData, runs: int, bits: bool) -> tuple[Table, Table]:
    """The x axes and columns of one of `runs` runs; its losses in bits per byte where `bits` asks for it."""
    axes, columns = build_table(run, max(400, MAX_POINTS // runs))
    if bits:
        each = bytes_per_token(run)
        assert each is not None  # need_bits would have raised
        for name in ("loss", "loss_smooth"):
            columns[name] = [to_bits(value, each) for value in columns.get(name, [])]
        columns |= {f"val_loss{which}": columns.get(f"val_bpb{which}", []) for which in ("", OF_AVERAGE)}
    return axes, columns


def panel_row(panel: Panel) -> Row:
    sources = dict.fromkeys(one.source for one in panel.references if one.source)
    labels = {source: [one.label for one in panel.references if one.source == source] for source in sources}
    sourced = [f"{', '.join(names)}: {source}" for source, names in labels.items()]
    return {
        "title": panel.title,
        "unit": panel.unit,
        "form": panel.form,
        "log": panel.log,
        "series": [line.__dict__ for line in panel.lines],
        "references": [{"label": one.label, "value": one.value} for one in panel.references],
        "note": " · ".join([*([panel.note] if panel.note else []), *sourced]),
    }


# ---- panels


def panels(runs: Sequence[RunData], tables: Sequence[Table], bits: bool) -> list[Panel]:
    """The charts in the order they stand, without those that have nothing to draw.

    One run has its raw values and smoothed ones; of several, each has one line, in one colour throughout.
    """
    alone = len(runs) == 1
    names = [] if alone else [printable(run.name) for run in runs]
    smoothed = "" if alone else ", smoothed"

    def each(column: str, label: str = "", role: str = "line") -> list[Line]:
        if alone:
            return [Line(role, column, label, "train")]
        return [Line(role, column, name, i, i) for i, name in enumerate(names)]

    def noisy(column: str) -> list[Line]:
        raw = [Line("raw", column, "each step", "train")] if alone else []
        return [*raw, *each(f"{column}_smooth", "smoothed")]

    clip = number(section(runs[0].config, "train").get("grad_clip")) if alone else None
    limit = [Reference("clipped above", clip)] if clip else []
    kinds = prefixed_lines(tables[0], "updates:", "line") if alone else []
    loads = prefixed_lines(tables[0], "expert_load:", "line") if alone else each(f"expert_load:{LEAST_EVEN}")
    if alone:
        losses = [loss_panel(runs[0]), source_panel(tables[0])]
    else:
        unit = "bits per byte" if bits else "nats per token"
        why = "the runs have different tokenizers, so losses are given per byte of text" if bits else ""
        validation = each("val_loss", role="points")
        losses = [
            Panel("Validation loss", unit, "loss", validation, loss_references(runs), note=why),
            Panel("Training loss", f"{unit}, smoothed", "loss", each("loss_smooth")),
        ]
    drawn = [
        *losses,
        *task_panels(tables, names),
        *tuned_panels(each, alone=alone),
        Panel("Learning rate", "", "rate", each("lr", "learning rate")),
        Panel("Gradient norm", f"before clipping{smoothed}", "norm", noisy("grad_norm"), limit),
        replace(UPDATES, lines=kinds or each("updates", "all matrices")),
        Panel("Load of experts", "the largest over the mean", "norm", loads, (Reference("even", 1.0),)),
        Panel("Throughput", f"tokens/s{smoothed}", "count", noisy("tokens_per_s")),
        Panel("MFU", f"model FLOPs utilisation{smoothed}", "percent", noisy("mfu")),
        Panel("Peak memory", "GiB", "gib", each("peak_memory_gib", "peak memory")),
    ]
    return with_values(drawn, tables)


def tuned_panels(each: Callable[..., list[Line]], *, alone: bool) -> list[Panel]:
    """Of preferences and of the model's own replies."""
    sides = [Line("line", "chosen", "chosen", "train"), Line("line", "rejected", "rejected", "val")]
    pairs = "log-probabilities of answers, or rewards" if alone else "chosen less rejected"
    return [
        Panel("Pairs", pairs, "loss", sides if alone else each("margin")),
        Panel("Reward", "mean of replies", "score", each("reward")),
        Panel("Length of replies", "tokens", "count", each("reply_tokens")),
        Panel("Entropy", "nats a token", "norm", each("entropy")),
        Panel("Rollout and training", "largest difference of a log-probability", "norm", each("max_delta_logp")),
    ]


def loss_panel(run: RunData) -> Panel:
    unigram = number(run.env.get("unigram_loss"))
    known = [Reference("unigram model", unigram)] if unigram is not None else []
    lines = [
        Line("raw", "loss", "train, each step", "train"),
        Line("line", "loss_smooth", "train, smoothed", "train"),
        Line("points", "val_loss", "validation", "val"),
        Line("points", f"val_loss{OF_AVERAGE}", "validation, averaged weights", 3),
    ]
    return Panel("Loss", "nats per token", "loss", lines, [*known, *loss_references([run])])


def prefixed_lines(table: Table, prefix: str, role: str) -> list[Line]:
    """A line for every column whose name begins with `prefix`."""
    names = [name for name in table if name.startswith(prefix)]
    return [Line(role, name, printable(name.removeprefix(prefix)), i) for i, name in enumerate(names)]


def source_panel(table: Table) -> Panel:
    lines = prefixed_lines(table, "val:", "points")
    note = f"the first {MAX_SOURCES} of {len(lines)} sources" if len(lines) > MAX_SOURCES else ""
    return Panel("Validation by source", "nats per token", "loss", lines[:MAX_SOURCES], note=note)


def task_panels(tables: Sequence[Table], names: Sequence[str] = ()) -> list[Panel]:
    """A chart a task, or a metric of it where metrics differ in kind; parts of a benchmark (`core/…`) have the table.

    With several runs, whose names are given, only the last metric of each chart is drawn, a line a run.
    """
    charted: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(name for table in tables for name in table if name.startswith("eval:")):
        task, _, metric = name.removeprefix("eval:").rpartition("/")
        of_replies = task.startswith("chat/") and metric in ("acc", "prompt_strict", "ended")
        if of_replies or ("/" not in task and metric != "missing"):
            kind = metric.removesuffix(OF_AVERAGE)
            charted.setdefault((task, "" if kind in ACCURACIES else kind), []).append(metric)
    drawn = []
    for (task, _), metrics in charted.items():
        # acc before acc_norm, the one with reference figures; after those of the average those of the last weights
        metrics = sorted(metrics, key=lambda metric: (not metric.endswith(OF_AVERAGE), metric))
        references = list(dict.fromkeys(one for metric in metrics for one in task_references(task, metric)))
        column = f"eval:{task}/"
        lines = [Line("points", column + metrics[-1], name, i, i) for i, name in enumerate(names)] or [
            Line("points", column + metric, printable(metric), ("val", "train")[i] if i < 2 else i)
            for i, metric in enumerate(reversed(metrics))
        ]
        drawn.append(Panel(printable(task), printable(metrics[-1]) if names else "", "score", lines, references))
    return drawn


def with_values(panels: Sequence[Panel], tables: Sequence[Table]) -> list[Panel]:
    """The panels that have something to draw, without the lines that have nothing."""
    kept = []
    for panel in panels:
        columns = [tables[line.run].get(line.column, []) for line in panel.lines]
        lines = [line for line, values in zip(panel.lines, columns) if any(value is not None for value in values)]
        if lines:
            kept.append(replace(panel, lines=lines))
    return kept


def with_difference(data: Row, bits: bool) -> Row:
    """`charts` of two runs with one more panel, the second run minus the first after as many tokens."""
    first, second = (run["axes"].get("tokens") for run in data["runs"])
    if first is None or second is None:
        return data
    ours, theirs = (run["columns"] for run in data["runs"])
    lines = []
    for column, role, label, hue in (
        ("loss_smooth", "line", "training, smoothed", 2),  # hues of neither run
        ("val_loss", "points", "validation", 3),
    ):
        found = difference(first, ours.get(column, []), second, theirs.get(column, []))
        if any(value is not None for value in found):
            ours[f"difference:{column}"] = found
            lines.append(Line(role, f"difference:{column}", label, hue))
    unit = f"{'bits per byte' if bits else 'nats per token'}, after as many tokens"
    shown = Panel("B - A", unit, "loss", lines, [Reference("no difference", 0.0)], note="below zero: B is ahead")
    data["panels"][2:2] = [panel_row(shown)] if lines else []
    return data


def difference(x: Column, a: Column, at: Column, b: Column) -> Column:
    """b - a at every `x` where `a` is known, b interpolated between its values; None beyond their ends."""
    known = [(place, value) for place, value in zip(at, b) if place is not None and value is not None]
    if not known:
        return [None] * len(x)
    places, values = zip(*known)
    there = np.interp([np.nan if place is None else place for place in x], places, values, left=np.nan, right=np.nan)
    return [None if value is None or np.isnan(other) else short(float(other) - value) for value, other in zip(a, there)]


# ---- events and samples


def events(run: RunData) -> list[Row]:
    """The newest events worth a mark, with their place on every axis."""
    last = run.train[-1]["step"]  # those beyond belong to what the run went back from
    kept = [row for row in run.events if row.get("name") not in UNMARKED and row["step"] <= last][-MAX_EVENTS:]
    axes = positions(run.train, [row["step"] for row in kept], begin_of(run))
    return [
        {"name": printable(mark_of(row)), **{axis: at[i] for axis, at in axes.items()}} for i, row in enumerate(kept)
    ]


def mark_of(event: Row) -> str:
    """Label of its mark: of a bad batch the action taken, `skip` or `rewind`."""
    policy = event.get("policy")
    return policy if policy in ("skip", "rewind") else str(event.get("name", "event"))


def samples(run: RunData) -> list[Row]:
    """Texts by step: step, prompt, texts, and the position of the step on the other axes."""
    found = []
    for row in thin_samples(run.samples):
        texts = row.get("texts")
        texts = texts if isinstance(texts, list) else []
        shown = [printable(one if len(one) <= MAX_TEXT else one[:MAX_TEXT] + " …") for one in map(str, texts)]
        found.append({"step": row["step"], "prompt": printable(row.get("prompt") or ""), "texts": shown})
    axes = positions(run.train, [row["step"] for row in found], begin_of(run))
    return [row | {axis: at[i] for axis, at in axes.items()} for i, row in enumerate(found)]


# ---- figures of other models, each with its source and the data it holds for


def loss_references(runs: Sequence[RunData]) -> list[Reference]:
    """GPT-2's validation loss, where it was measured on the same text in the same tokens."""
    return [GPT2_ON_FINEWEB_EDU] if all(map(is_fineweb_edu_in_gpt2_tokens, runs)) else []


def is_fineweb_edu_in_gpt2_tokens(run: RunData) -> bool:
    """Whether all that the run read is FineWeb-Edu, encoded by GPT-2's tokenizer, as far as env.json states it."""
    data = run.env.get("data")
    if not isinstance(data, dict) or data.get("tokenizer") != "gpt2":
        return False
    sources = data.get("sources")
    return isinstance(sources, list) and bool(sources) and all(FINEWEB_EDU.search(str(one)) for one in sources)


def task_references(task: str, metric: str) -> list[Reference]:
    if task == "core" and metric.startswith("centered"):  # of a part of the tasks, too: that has a name of its own
        return [CHANCE_IN_CORE]
    return list(TASKS.get((task, metric), ()))
