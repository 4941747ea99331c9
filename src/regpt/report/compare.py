"""Two runs against each other: differing keys, final numbers, whether they differ by more than chance, in words."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isclose

from regpt.console.text import counted
from regpt.errors import UserError
from regpt.report.read import Differences, Items, Row, RunData, differences, kept_items, number, section
from regpt.report.series import begin_of, need_bits, positions
from regpt.report.statistics import PairTest, SeedNoise, against_seeds, paired_test, unpaired_z
from regpt.report.summary import RunSummary, summarize

SEEDS = ("train.seed", "data.seed", "sample.seed")
LOWER_IS_BETTER = ("loss", "bpb", "bits_per_byte", "perplexity", "role_leak", "repetition", "reply_tokens")
LOSS, BITS, AVERAGED = "validation loss", "bits per byte", "averaged weights: "
SAME_TOKENS = 1.01  # times as many tokens still are as many: another batch size, a step more
HEADLINE = ("acc_norm", "centered", "acc")  # the metric that an item's `correct` stands for: the first one there is
Scores = tuple[list[float], list[float]]  # of the same items by A and by B
HEAD = ("measure", "A", "B", "B - A", "95 % interval", "test", "p", "conclusion")
SEEDS_HEAD = ("measure", "B - A, means", "deviation", "runs of A + B", "p", "conclusion")


# ---- numbers


@dataclass(frozen=True)
class Measured:
    """A number of a run, the step it was measured at, its standard error and the validation tokens it was measured on
    where the run has them, and the tokens that were read before."""

    value: float
    step: int
    stderr: float | None
    measured_on: float | None
    tokens: float | None


def measurements(run: RunData) -> Iterator[tuple[str, Measured]]:
    """All measured numbers by their names in comparisons, ascending by step."""
    rows = [*run.val, *run.val_sources, *run.evals]
    tokens = positions(run.train, [row["step"] for row in rows], begin_of(run)).get("tokens") or [None] * len(rows)
    for row, read in zip(rows, tokens):
        names = [(LOSS, "loss", "stderr"), (BITS, "bpb", "bpb_stderr")]
        names += [(AVERAGED + LOSS, "loss_ema", ""), (AVERAGED + BITS, "bpb_ema", "")]
        if row["kind"] == "eval":
            names = [(f"{row.get('task')} {row.get('metric')}", "value", "stderr")]
        elif "source" in row:
            names = [(f"{LOSS}, {row['source']}", "loss", "stderr")]
        for name, key, error in names if row.get("metric") != "missing" else ():
            if (value := number(row.get(key))) is not None:
                yield name, Measured(value, row["step"], number(row.get(error)), number(row.get("tokens")), read)


def is_validation(name: str) -> bool:
    return name.removeprefix(AVERAGED).startswith((LOSS, BITS))


@dataclass(frozen=True)
class Measure:
    """One number of both runs.

    Attributes:
        name: `validation loss`, `hellaswag acc_norm`, …
        lower: a lower value is better.
        test: whether they differ by more than the sampling of items explains; None for a reason given in `why`.
        seeds: whether they differ by more than seeds explain, where runs of other seeds were given.
    """

    name: str
    a: Measured
    b: Measured
    lower: bool
    test: PairTest | None
    why: str
    seeds: SeedNoise | None = None

    @property
    def equally_trained(self) -> bool:
        """Whether A and B had read as much, as far as the runs state it; within a step or two of other batches."""
        return same_amount(self.a.tokens, self.b.tokens)

    @property
    def difference(self) -> float:
        return self.b.value - self.a.value

    @property
    def better(self) -> str:
        """`a`, `b` or `` for equal numbers."""
        if self.difference == 0:
            return ""
        return "b" if (self.difference < 0) == self.lower else "a"

    def conclusion(self) -> str:
        """Whether the difference is more than chance, in words."""
        if self.seeds is not None:
            outcome = f"{'exceeds' if self.seeds.exceeds else 'within'} the noise between seeds"
        elif self.test is None:
            outcome = self.why
        else:
            outcome = "differs" if self.test.significant else "no difference shown"
        return outcome if self.equally_trained else f"unequal training; {outcome}"


def same_amount(a: float | None, b: float | None) -> bool:
    """Whether two counts of tokens are about the same; True where one is unknown."""
    return a is None or b is None or max(a, b) <= SAME_TOKENS * min(a, b)


# ---- the comparison


@dataclass(frozen=True)
class RunComparison:
    """A and B, compared.

    Attributes:
        seeds: runs of other seeds, of A's and of B's configuration.
        differing: keys of `config`, `code` and `data` (see `differences`).
        bits: losses are compared in bits per byte, as the tokenizers differ.
        measures: the last values of everything that both measured.
        curve: tokens read, and both validation losses then.
        equal: their validation where both had last read as much, if one of them went on.
    """

    a: RunData
    b: RunData
    seeds: tuple[list[RunData], list[RunData]]
    bits: bool
    differing: dict[str, Differences]
    measures: list[Measure]
    curve: list[tuple[int, float, float]]
    equal: Measure | None

    @property
    def training(self) -> tuple[RunSummary, RunSummary]:
        return summarize(self.a), summarize(self.b)


def compare(a: RunData, b: RunData, seeds: Sequence[RunData] = ()) -> RunComparison:
    """Compare B with A; `seeds` are runs of A's or B's configuration with other seeds.

    Raises:
        UserError: different tokenizers without bits per byte; a run of `seeds` that differs in more than its seeds.
    """
    groups, runs = sort_seeds(a, b, seeds), [a, b]
    bits, found = need_bits(runs), differences(runs)
    unit, same_data = BITS if bits else LOSS, not found["data"]
    ours, theirs = (
        {int(one.tokens): one for name, one in measurements(run) if name == unit and one.tokens is not None}
        for run in runs
    )
    common = sorted(ours.keys() & theirs.keys())
    equal = None
    if common and common[-1] > 0 and not common[-1] == max(ours) == max(theirs):
        equal = measure(unit, ours[common[-1]], theirs[common[-1]], same_data)
    measures = final_measures([a, *groups[0]], [b, *groups[1]], bits, same_data)
    curve = [(tokens, ours[tokens].value, theirs[tokens].value) for tokens in common]
    return RunComparison(a, b, groups, bits, found, measures, curve, equal)


def sort_seeds(a: RunData, b: RunData, seeds: Sequence[RunData]) -> tuple[list[RunData], list[RunData]]:
    """Assign each run to the one of A and B whose configuration it repeats; it must have read as much."""
    groups: tuple[list[RunData], list[RunData]] = ([], [])
    for run in seeds:
        from_a, from_b = beyond_seeds(a, run), beyond_seeds(b, run)
        if from_a and from_b:
            fewer, name = min((from_a, a.name), (from_b, b.name), key=lambda one: len(one[0]))
            raise UserError(
                f"the run {run.name!r} of --seeds differs from {name!r} in more than its seeds ({', '.join(fewer[:5])}"
                f"{', …' if len(fewer) > 5 else ''}); give runs of the same configuration with other seeds"
            )
        repeated = b if from_a else a
        ours, theirs = summarize(repeated).tokens, summarize(run).tokens
        if ours and theirs and not same_amount(ours, theirs):
            raise UserError(
                f"the run {run.name!r} of --seeds has read {theirs:,.0f} tokens, {repeated.name!r} {ours:,.0f}; finish "
                "the shorter one, or leave it out"
            )
        for other in (repeated, *groups[bool(from_a)]):
            if seeds_of(run) == seeds_of(other):
                raise UserError(
                    f"the run {run.name!r} of --seeds has the seeds of {other.name!r}, so it says nothing of the noise "
                    "between seeds; leave it out, or give runs of other seeds"
                )
        groups[bool(from_a)].append(run)
    return groups


def seeds_of(run: RunData) -> list[object]:
    return [section(run.config, key.partition(".")[0]).get(key.partition(".")[2]) for key in SEEDS]


def beyond_seeds(a: RunData, b: RunData) -> list[str]:
    """Keys of the configuration in which the runs differ, seeds aside, and of the data."""
    found = differences([a, b])
    config = [key for key, _ in found["config"] if key not in (*SEEDS, "data.path")]
    return config + [f"data: {key}" for key, _ in found["data"]]


def final_measures(ours: Sequence[RunData], theirs: Sequence[RunData], bits: bool, same_data: bool) -> list[Measure]:
    """Last values that A and B, the first of both groups, have in common; without losses a token where the tokens
    differ, which have no common unit."""
    groups = [[dict(measurements(run)) for run in group] for group in (ours, theirs)]
    scores_of = paired_scores(ours[0], theirs[0])
    found = []
    for name, x in groups[0][0].items():
        if (y := groups[1][0].get(name)) is None or (bits and is_validation(name) and BITS not in name):
            continue
        one = measure(name, x, y, same_data, scores_of(name, (x.step, y.step)))
        if same_data or not is_validation(name):
            values = ([run[name].value for run in group if name in run] for group in groups)
            one = replace(one, seeds=against_seeds(*values))
        found.append(one)
    return found


def measure(name: str, a: Measured, b: Measured, same_data: bool, scores: Scores | None = None) -> Measure:
    """The number of both runs with the best test that they allow, or the reason for not testing."""
    lower, test = is_validation(name) or name.rpartition(" ")[2] in LOWER_IS_BETTER, None
    if is_validation(name) and not same_data:
        why = "other data"
    elif a.measured_on != b.measured_on and None not in (a.measured_on, b.measured_on):
        why = f"validated on {a.measured_on:,.0f} and {b.measured_on:,.0f} tokens"
    elif scores is not None and len(scores[0]) > 1:
        test, why = paired_test(*scores), ""
    elif a.stderr is not None and b.stderr is not None:
        test, why = unpaired_z(a.value, a.stderr, b.value, b.stderr), ""
    else:
        why = "no scores" if scores is None else "one item has no spread"
    return Measure(name, a, b, lower, test, why and f"not tested: {why}")


# ---- scores of items, paired


def paired_scores(a: RunData, b: RunData) -> Callable[[str, tuple[int, int]], Scores | None]:
    """Name of a measure, and the steps of both runs → the scores of the items that both have kept of these steps."""

    @cache
    def items(task: str, steps: tuple[int, int]) -> list[Items | None]:
        return [kept_items(run, task, step) for run, step in zip((a, b), steps)]

    def scores(name: str, steps: tuple[int, int]) -> Scores | None:
        if name.startswith(AVERAGED):
            return None  # of these only the number is kept
        task, _, metric = ("val", "", "") if is_validation(name) else name.rpartition(" ")
        ours, theirs = items(task, steps)
        if ours is None or theirs is None:
            return None
        both = (ours, theirs)
        if task == "val":
            return validation_scores(both, name)
        metrics = {row.get("metric") for run in (a, b) for row in run.evals if row.get("task") == task}
        is_headline = metric == next((one for one in HEADLINE if one in metrics), None)
        return common_scores(both, metric) or (common_scores(both, "correct") if is_headline else None)

    return scores


def validation_scores(both: tuple[Items, Items], name: str) -> Scores | None:
    """Losses of the batches that both runs validated on; of one source where `name` ends in one.

    Each is weighted by its tokens (bytes), so that the mean is the whole's loss (bits per byte).
    """
    source = name.partition(", ")[2]
    key, weight = ("bpb", "bytes") if name.startswith("bits") else ("loss", "tokens")
    ours = {item: row for item, row in both[0].items() if source in ("", row.get("source"))}
    found, weights = common_scores((ours, both[1]), key), common_scores((ours, both[1]), weight)
    if found is None or weights is None or len(weights[0]) != len(found[0]) or weights[0] != weights[1]:
        return found
    mean = sum(weights[0]) / len(weights[0])
    x, y = ([value * w / mean for value, w in zip(values, weights[0])] for values in found)
    return x, y


def common_scores(both: tuple[Items, Items], key: str) -> Scores | None:
    """The values of `key` of the items that both have, in one order; None without any."""

    def score(row: Row) -> float | None:
        return float(row[key]) if isinstance(row.get(key), bool) else number(row.get(key))

    pairs = [(score(row), score(both[1][item])) for item, row in both[0].items() if item in both[1]]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return ([x for x, _ in known], [y for _, y in known]) if known else None


# ---- in words and cells, for the terminal and the page


def headline_of_runs(found: RunComparison) -> str:
    """Name the run with the better validation loss, and whether that is more than chance.

    Where one of them is trained less, that comes first, then their losses where both had read as much.
    """
    if not found.measures:
        return "The runs have no measure in common: neither validation losses nor evaluations."
    named = {one.name: one for one in found.measures}
    one = named.get(LOSS) or named.get(BITS) or found.measures[0]
    unequal, text, equal = not one.equally_trained, winner(found, one), found.equal
    if not unequal and not any(training.unfinished for training in found.training):
        return f"{text if one.better else text.capitalize()}."
    clauses = []
    for run, training in zip((found.a, found.b), found.training):
        tokens = "" if training.tokens is None else f" on {training.tokens:,.0f} tokens"
        unfinished = f", unfinished ({training.planned_steps:,.0f} planned)" if training.unfinished else ""
        clauses.append(f"{run.name} has made {counted(training.steps, 'step')}{tokens}{unfinished}")
    notice = f"{'Unequal' if unequal else 'Unfinished'} training: {'; '.join(clauses)}."
    if equal is None:
        return f"{notice} {text} (A after step {one.a.step:,}, B after step {one.b.step:,})."
    steps = f"{equal.a.tokens:,.0f}; step {equal.a.step:,} of A, {equal.b.step:,} of B"
    return f"{notice} After as many tokens ({steps}): {winner(found, equal)}. At the end of each: {text}."


def winner(found: RunComparison, one: Measure) -> str:
    """`B has the better validation loss: 3.2000 against 3.3000, a significant difference (…)`."""
    a, b = f"{one.a.value:.4f}", f"{one.b.value:.4f}"
    if not one.better:
        return f"both runs have the same {one.name}, {a}"
    name, values = (found.b.name, f"{b} against {a}") if one.better == "b" else (found.a.name, f"{a} against {b}")
    text = f"{name} has the better {one.name}: {values}"
    text += f" ({one.why})" if one.test is None else ""
    if one.test is not None:
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
    return counted(one.test.n, *(("validation batch", "validation batches") if is_validation(one.name) else ("item",)))


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
    rows = []
    for one in found.measures:
        if (seeds := one.seeds) is not None:
            runs, p = f"{seeds.runs[0]} + {seeds.runs[1]}", p_value(seeds.p).removeprefix("p = ")
            rows.append([one.name, f"{seeds.difference:+.4f}", f"{seeds.deviation:.4f}", runs, p, one.conclusion()])
    return rows


def p_value(p: float) -> str:
    """`p = 0.023`, `p = 3e-07`, `p < 1e-300`."""
    if p < 1e-300:
        return "p < 1e-300"
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.0e}"
