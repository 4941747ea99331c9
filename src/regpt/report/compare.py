"""Two runs against each other: differing keys, and final numbers that differ by more than chance."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from regpt.errors import UserError
from regpt.report.markup import flatten
from regpt.report.read import Items, Row, RunData, kept_items, number, section
from regpt.report.series import need_bits, positions
from regpt.report.statistics import PairTest, SeedNoise, against_seeds, paired_test, unpaired_z
from regpt.report.summary import RunSummary, summarize

DATA = ("manifest_sha256", "tokenizer", "tokenizer_sha256", "train_tokens", "val_tokens")
# Follow from other keys, differ between any two runs, or are shown elsewhere.
INCIDENTAL = ("argv", "started", "host", "data", "unigram_loss", "parameters", "peak")
SEEDS = ("train.seed", "data.seed", "sample.seed")
LOWER_IS_BETTER = ("loss", "bpb", "bits_per_byte", "perplexity")
LOSS, BITS, AVERAGED = "validation loss", "bits per byte", "averaged weights: "
SAME_TOKENS = 1.01  # times as many tokens still are as many: another batch size, a step more
HEADLINE = ("acc_norm", "centered", "acc")  # the metric that an item's `correct` stands for: the first one there is
Differences = list[tuple[str, list[Any]]]  # keys, joined with dots, and each run's value, None where it has none
Scores = tuple[list[float], list[float]]  # of the same items by A and by B


# ---- differing keys of configuration, code and data


def differing(documents: Sequence[Row]) -> Differences:
    """Keys whose values are not the same in all `documents`."""
    flat = [dict(flatten(document)) for document in documents]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def config_differences(runs: Sequence[RunData]) -> Differences:
    return differing([run.config for run in runs])


def code_differences(runs: Sequence[RunData]) -> Differences:
    """Versions, commit and machine."""
    return differing([{key: value for key, value in run.env.items() if key not in INCIDENTAL} for run in runs])


def data_differences(runs: Sequence[RunData]) -> Differences:
    """Hashes and counts of the data, not their path."""
    tables = [section(run.env, "data") for run in runs]
    return differing([{key: table[key] for key in DATA if key in table} for table in tables])


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
    tokens = positions(run.train, [row["step"] for row in rows]).get("tokens") or [None] * len(rows)
    for row, read in zip(rows, tokens):
        for name, key, error in names_of(row):
            if (value := number(row.get(key))) is not None:
                yield name, Measured(value, row["step"], number(row.get(error)), number(row.get("tokens")), read)


def names_of(row: Row) -> list[tuple[str, str, str]]:
    """Names of the numbers of a row, and the keys of their value and error."""
    if row["kind"] == "eval":
        missing = row.get("metric") == "missing"
        return [] if missing else [(f"{row.get('task')} {row.get('metric')}", "value", "stderr")]
    if "source" in row:
        return [(f"{LOSS}, {row['source']}", "loss", "stderr")]
    of_average = [(AVERAGED + LOSS, "loss_ema", ""), (AVERAGED + BITS, "bpb_ema", "")]
    return [(LOSS, "loss", "stderr"), (BITS, "bpb", "bpb_stderr"), *of_average]


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
            outcome = "exceeds the noise between seeds" if self.seeds.exceeds else "within the noise between seeds"
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
        bits: losses are compared in bits per byte, as the tokenizers differ.
        measures: the last values of everything that both measured.
        curve: tokens read, and both validation losses then.
        equal: their validation where both had last read as much, if one of them went on.
    """

    a: RunData
    b: RunData
    seeds: tuple[list[RunData], list[RunData]]
    bits: bool
    config: Differences
    code: Differences
    data: Differences
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
    groups = sort_seeds(a, b, seeds)
    runs = [a, b]
    bits, data = need_bits(runs), data_differences(runs)
    unit = BITS if bits else LOSS
    ours, theirs = (
        {int(one.tokens): one for name, one in measurements(run) if name == unit and one.tokens is not None}
        for run in runs
    )
    common = sorted(ours.keys() & theirs.keys())
    equal = None
    if common and common[-1] > 0 and not common[-1] == max(ours) == max(theirs):
        x, y = ours[common[-1]], theirs[common[-1]]
        equal = Measure(unit, x, y, True, *(best_test(x, y, None) if not data else (None, "not tested: other data")))
    return RunComparison(
        a=a,
        b=b,
        seeds=groups,
        bits=bits,
        config=config_differences(runs),
        code=code_differences(runs),
        data=data,
        measures=final_measures([a, *groups[0]], [b, *groups[1]], bits, same_data=not data),
        curve=[(tokens, ours[tokens].value, theirs[tokens].value) for tokens in common],
        equal=equal,
    )


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
        groups[bool(from_a)].append(run)
    return groups


def beyond_seeds(a: RunData, b: RunData) -> list[str]:
    """Keys of the configuration in which the runs differ, seeds aside, and of the data."""
    config = [key for key, _ in config_differences([a, b]) if key not in (*SEEDS, "data.path")]
    return config + [f"data: {key}" for key, _ in data_differences([a, b])]


def final_measures(ours: Sequence[RunData], theirs: Sequence[RunData], bits: bool, same_data: bool) -> list[Measure]:
    """Last values that A and B, the first of both groups, have in common; without losses a token where the tokens
    differ, which have no common unit."""
    groups = [[dict(measurements(run)) for run in group] for group in (ours, theirs)]
    scores_of = paired_scores(ours[0], theirs[0])
    found = []
    for name, x in groups[0][0].items():
        validation = is_validation(name)
        if (y := groups[1][0].get(name)) is None or (bits and validation and BITS not in name):
            continue
        lower = validation or name.rpartition(" ")[2] in LOWER_IS_BETTER
        if validation and not same_data:
            found.append(Measure(name, x, y, lower, None, "not tested: other data"))
            continue
        values = ([one[name].value for one in group if name in one] for group in groups)
        test = best_test(x, y, scores_of(name, (x.step, y.step)))
        found.append(Measure(name, x, y, lower, *test, against_seeds(*values)))
    return found


def best_test(a: Measured, b: Measured, scores: Scores | None) -> tuple[PairTest | None, str]:
    """Run the best test that the runs allow; or the reason for not testing."""
    if a.measured_on != b.measured_on and None not in (a.measured_on, b.measured_on):
        return None, f"not tested: validated on {a.measured_on:,.0f} and {b.measured_on:,.0f} tokens"
    if scores is not None:
        return paired_test(*scores), ""
    if a.stderr is not None and b.stderr is not None:
        return unpaired_z(a.value, a.stderr, b.value, b.stderr), ""
    return None, "not tested: no scores"


# ---- scores of items, paired


def paired_scores(a: RunData, b: RunData) -> Callable[[str, tuple[int, int]], Scores | None]:
    """Name of a measure, and the steps of both runs → the scores of the items that both have kept of these steps."""

    @cache
    def items(task: str, steps: tuple[int, int]) -> tuple[Items, Items] | None:
        ours, theirs = (kept_items(run, task, step) for run, step in zip((a, b), steps))
        return None if ours is None or theirs is None else (ours, theirs)

    def scores(name: str, steps: tuple[int, int]) -> Scores | None:
        if name.startswith(AVERAGED):
            return None  # of these only the number is kept
        task, _, metric = ("val", "", "") if is_validation(name) else name.rpartition(" ")
        if (both := items(task, steps)) is None:
            return None
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
        value = row.get(key)
        return float(value) if isinstance(value, bool) else number(value)

    pairs = [(score(row), score(both[1][item])) for item, row in both[0].items() if item in both[1]]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return ([x for x, _ in known], [y for _, y in known]) if known else None


# ---- as JSON


def comparison_dict(found: RunComparison) -> Row:
    """The comparison for scripts."""
    names = (found.a.name, found.b.name)
    training = [
        {"steps": one.steps, "planned": one.planned_steps, "tokens": one.tokens, "unfinished": one.unfinished}
        for one in found.training
    ]
    return {
        "a": names[0],
        "b": names[1],
        "seeds": [[run.name for run in group] for group in found.seeds],
        **{
            part: {key: dict(zip(("a", "b"), values)) for key, values in getattr(found, part)}
            for part in ("config", "code", "data")
        },
        "measures": [measure_dict(one) for one in found.measures],
        "curve": [dict(zip(("tokens", "a", "b"), point)) for point in found.curve],
        "curve_unit": BITS if found.bits else "nats per token",
        "training": dict(zip(("a", "b"), training)),
        "after_equal_tokens": None if found.equal is None else measure_dict(found.equal),
    }


def measure_dict(one: Measure) -> Row:
    return {
        "name": one.name,
        "a": one.a.value,
        "b": one.b.value,
        "difference": one.difference,
        "better": one.better or None,
        "step_a": one.a.step,
        "step_b": one.b.step,
        "tokens_a": one.a.tokens,
        "tokens_b": one.b.tokens,
        "equally_trained": one.equally_trained,
        "test": None if one.test is None else asdict(one.test) | {"significant": one.test.significant},
        "seeds": None if one.seeds is None else asdict(one.seeds) | {"exceeds": one.seeds.exceeds},
        "conclusion": one.conclusion(),
    }
