"""A comparison in words and cells, for the terminal and the page."""

import subprocess
from math import isclose
from pathlib import Path

import regpt
from regpt.console.text import counted
from regpt.report.compare import BITS, LOSS, Measure, RunComparison, is_validation
from regpt.report.read import RunData

MAX_FILES = 20
HEAD = ("measure", "A", "B", "B - A", "95 % interval", "test", "p", "conclusion")
SEEDS_HEAD = ("measure", "B - A, means", "deviation", "runs of A + B", "p", "conclusion")


def headline_of_runs(found: RunComparison) -> str:
    """Name the run with the better validation loss, and whether that is more than chance.

    Where one of them is trained less, that comes first, then their losses where both had read as much.
    """
    if not found.measures:
        return "The runs have no measure in common: neither validation losses nor evaluations."
    named = {one.name: one for one in found.measures}
    one = named.get(LOSS) or named.get(BITS) or found.measures[0]
    notice = unequal_training(found, one)
    if notice and (equal := found.equal) is not None:
        steps = f"{equal.a.tokens:,.0f}; step {equal.a.step:,} of A, {equal.b.step:,} of B"
        return f"{notice} After as many tokens ({steps}): {winner(found, equal)}. At the end of each: " + (
            f"{winner(found, one)}."
        )
    if notice:
        return f"{notice} {winner(found, one)} (A after step {one.a.step:,}, B after step {one.b.step:,})."
    text = winner(found, one)
    return f"{text if one.better else text.capitalize()}."


def unequal_training(found: RunComparison, one: Measure) -> str:
    """A sentence where the runs did not read as much, or one is unfinished; empty where both are as far as planned."""
    if one.equally_trained and not any(training.unfinished for training in found.training):
        return ""
    clauses = []
    for run, training in zip((found.a, found.b), found.training):
        tokens = "" if training.tokens is None else f" on {training.tokens:,.0f} tokens"
        unfinished = f", unfinished ({training.planned_steps:,.0f} planned)" if training.unfinished else ""
        clauses.append(f"{run.name} has made {counted(training.steps, 'step')}{tokens}{unfinished}")
    return f"{'Unfinished' if one.equally_trained else 'Unequal'} training: {'; '.join(clauses)}."


def winner(found: RunComparison, one: Measure) -> str:
    """`B has the better validation loss: 3.2000 against 3.3000, a significant difference (…)`."""
    a, b = f"{one.a.value:.4f}", f"{one.b.value:.4f}"
    if not one.better:
        return f"both runs have the same {one.name}, {a}"
    name, values = (found.b.name, f"{b} against {a}") if one.better == "b" else (found.a.name, f"{a} against {b}")
    text = f"{name} has the better {one.name}: {values}"
    if one.test is None:
        text += f" ({one.why})"
    else:
        items = f"over {units(one)}, " if one.test.n else ""
        word = "a significant" if one.test.significant else "no significant"
        text += f", {word} difference ({items}{one.test.name}, {p_value(one.test.p)})"
    if one.seeds is not None:
        word = "exceeds" if one.seeds.exceeds else "does not exceed"
        noise = f"standard deviation {one.seeds.deviation:.2g} over {counted(sum(one.seeds.runs), 'run')}"
        text += f"; the difference {word} the noise between seeds ({noise}, {p_value(one.seeds.p)})"
    return text


def units(one: Measure) -> str:
    """`1,000 items`, `8 validation batches`: the units that the test counts; empty without a count."""
    if one.test is None or not one.test.n:
        return ""
    kind = ("validation batch", "validation batches") if is_validation(one.name) else ("item", "items")
    return counted(one.test.n, *kind)


def measure_cells(one: Measure) -> list[str]:
    """A row under `HEAD`."""
    cells = [one.name, f"{one.a.value:.4f}", f"{one.b.value:.4f}", f"{one.difference:+.4f}"]
    if one.test is None:
        return [*cells, "", "", "", one.conclusion()]
    low, high = one.test.interval
    # The mean difference of the items is not that of the two numbers for a centred accuracy, nor where the runs kept
    # different items.
    fits = isclose(one.test.difference, one.difference, abs_tol=max(1e-6, (high - low) / 20))
    test = one.test.name + (f", {units(one)}" if one.test.n else "")
    interval = f"{low:+.4f} to {high:+.4f}" if fits else ""
    return [*cells, interval, test, p_value(one.test.p).removeprefix("p = "), one.conclusion()]


def seeds_rows(found: RunComparison) -> list[list[str]]:
    """A row under `SEEDS_HEAD` for each measure that other seeds have."""
    return [
        [
            one.name,
            f"{seeds.difference:+.4f}",
            f"{seeds.deviation:.4f}",
            f"{seeds.runs[0]} + {seeds.runs[1]}",
            p_value(seeds.p).removeprefix("p = "),
            one.conclusion(),
        ]
        for one in found.measures
        if (seeds := one.seeds) is not None
    ]


def p_value(p: float) -> str:
    """`p = 0.023`, `p = 3e-07`, `p < 1e-300`."""
    if p < 1e-300:
        return "p < 1e-300"
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.0e}"


# ---- the source


def code_lines(found: RunComparison) -> list[str]:
    """A line for each file of the source that changed between the two runs, as far as that is known."""
    files = changed_files(found.a, found.b) if any(key == "commit" for key, _ in found.code) else None
    lines = (files or [])[:MAX_FILES]
    if files is not None:
        lines += [] if files else ["no file of the package differs between the two commits"]
        lines += [f"… {len(files) - MAX_FILES} more files"] if len(files) > MAX_FILES else []
    dirty = [name for name, run in (("A", found.a), ("B", found.b)) if str(run.env.get("commit") or "").endswith("+")]
    return [*lines, *(f"{name} ran with changes that were not committed: they are not known" for name in dirty)]


def changed_files(a: RunData, b: RunData) -> list[str] | None:
    """Paths of the package with lines added and removed between the runs' commits; None where the checkout that regpt
    runs from does not know both. A commit that ends in `+` had changes that were not recorded."""
    commits = [str(run.env.get("commit") or "").removesuffix("+") for run in (a, b)]
    if not all(commits):
        return None
    here = Path(regpt.__file__).parent
    command = ["git", "-C", str(here), "diff", "--numstat", "--relative", *commits, "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    lines = [line.split("\t", 2) for line in done.stdout.splitlines()]
    return [f"{path} +{added} -{removed}" for added, removed, path in lines]
