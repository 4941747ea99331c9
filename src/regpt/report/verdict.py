"""A comparison in words and cells, for the terminal and the page."""

from collections.abc import Sequence
from math import isclose

from regpt.console.text import counted
from regpt.report.code import changed_files, has_unrecorded_changes
from regpt.report.compare import Comparison, Measure, is_validation
from regpt.report.summary import count

MAX_FILES = 20
HEAD = ("measure", "A", "B", "B - A", "95 % interval", "test", "p", "conclusion")


def headline(found: Comparison) -> str:
    """Which run is better in what matters most, and whether that is more than chance; first of all, where it is so,
    that one of them is trained less, and what they were where both had read as much."""
    if not found.measures:
        return "The runs have no measure in common: neither validation losses nor evaluations."
    one = main_measure(found.measures)
    said = unequal_training(found, one)
    if said and found.equal is not None:
        tokens = f"{found.equal.tokens[0]:,.0f}"
        said += f" After as many tokens ({tokens}; step {found.equal.step_a:,} of A, {found.equal.step_b:,} of B): "
        return f"{said}{winner(found, found.equal)}. At the end of each: {winner(found, one)}."
    if said:
        return f"{said} {winner(found, one)} (A after step {one.step_a:,}, B after step {one.step_b:,})."
    text = winner(found, one)
    return f"{text if one.better else text.capitalize()}."


def unequal_training(found: Comparison, one: Measure) -> str:
    """A sentence where the runs did not read as much, or one is unfinished; empty where both are as far as planned."""
    if one.equally_trained and not any(training.unfinished for training in found.training):
        return ""
    said = []
    for run, training in zip((found.a, found.b), found.training):
        tokens = "" if training.tokens is None else f" on {training.tokens:,.0f} tokens"
        unfinished = f", unfinished ({training.planned:,.0f} planned)" if training.unfinished else ""
        said.append(f"{run.name} has made {count(training.steps, 'step')}{tokens}{unfinished}")
    return f"{'Unfinished' if one.equally_trained else 'Unequal'} training: {'; '.join(said)}."


def winner(found: Comparison, one: Measure) -> str:
    names = {"a": found.a.name, "b": found.b.name}
    if not one.better:
        return f"both runs have the same {one.name}, {decimals(one.a)}"
    text = f"{names[one.better]} has the better {one.name}: {decimals(one.b if one.better == 'b' else one.a)} against "
    text += decimals(one.a if one.better == "b" else one.b)
    text += f", {significance(one)}" if one.test is not None else f" ({one.why})"
    return text + seeds_clause(one)


def main_measure(measures: Sequence[Measure]) -> Measure:
    """Validation loss, or bits per byte where tokens differ, or else what comes first."""
    named = {one.name: one for one in measures}
    return named.get("validation loss") or named.get("bits per byte") or measures[0]


def significance(one: Measure) -> str:
    assert one.test is not None
    items = f"over {units(one)}, " if one.test.n else ""
    word = "a significant difference" if one.test.significant else "no significant difference"
    return f"{word} ({items}{one.test.name}, {p_value(one.test.p)})"


def units(one: Measure) -> str:
    """What the test counts: `1,000 items`, `8 validation batches`."""
    n = one.test.n if one.test else None
    if not n:
        return ""
    return f"{n:,} validation batch{'' if n == 1 else 'es'}" if is_validation(one.name) else count(n, "item")


def seeds_clause(one: Measure) -> str:
    if one.seeds is None:
        return ""
    runs, spread = sum(one.seeds.runs), one.seeds.deviation
    word = "exceeds" if one.seeds.exceeds else "does not exceed"
    noise = f"standard deviation {spread:.2g} over {counted(runs, 'run')}, {p_value(one.seeds.p)}"
    return f"; the difference {word} the noise between seeds ({noise})"


def measure_cells(one: Measure) -> list[str]:
    """A row under `HEAD`."""
    interval = one.test.interval if one.test and fits(one) else None
    test = one.test.name + (f", {units(one)}" if one.test.n else "") if one.test else ""
    return [
        one.name,
        decimals(one.a),
        decimals(one.b),
        f"{one.difference:+.4f}",
        "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
        test,
        p_value(one.test.p).removeprefix("p = ") if one.test else "",
        one.conclusion(),
    ]


def fits(one: Measure) -> bool:
    """Whether the mean difference of the items is that of the two numbers: not of a centred accuracy, nor where the
    runs kept different items."""
    assert one.test is not None
    low, high = one.test.interval
    return isclose(one.test.difference, one.difference, abs_tol=max(1e-6, (high - low) / 20))


def seeds_rows(found: Comparison) -> list[list[str]]:
    """Measure, deviation between seeds, runs, difference of the means in deviations, p, for each measure with seeds."""
    return [
        [
            one.name,
            f"{one.seeds.difference:+.4f}",
            f"{one.seeds.deviation:.4f}",
            f"{one.seeds.runs[0]} + {one.seeds.runs[1]}",
            p_value(one.seeds.p).removeprefix("p = "),
            one.conclusion(),
        ]
        for one in found.measures
        if one.seeds is not None
    ]


SEEDS_HEAD = ("measure", "B - A, means", "deviation", "runs of A + B", "p", "conclusion")


def code_lines(found: Comparison) -> list[str]:
    """What is known of the source between the two runs, a line each."""
    said = []
    files = changed_files(found.a, found.b) if any(key == "commit" for key, _ in found.code) else None
    if files is not None:
        said += files[:MAX_FILES] if files else ["no file of the package differs between the two commits"]
        said += [f"… {len(files) - MAX_FILES} more files"] if len(files) > MAX_FILES else []
    for name, run in (("A", found.a), ("B", found.b)):
        if has_unrecorded_changes(run):
            said.append(f"{name} ran with changes that were not committed: they are not known")
    return said


def decimals(value: float) -> str:
    return f"{value:.4f}"


def p_value(p: float) -> str:
    """`p = 0.023`, `p = 3e-07`, `p < 1e-300`."""
    if p < 1e-300:
        return "p < 1e-300"
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.0e}"
