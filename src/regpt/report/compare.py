"""Two runs against each other: what differs between them, and which final numbers differ by more than chance."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from regpt.errors import UserError
from regpt.report.bits import need_bits
from regpt.report.differences import code_differences, config_differences, data_differences, differing
from regpt.report.items import Items, common_scores, kept_items
from regpt.report.read import Row, Run, number
from regpt.report.series import positions
from regpt.report.significance import SeedNoise, Test, against_seeds, paired_test, unpaired_z
from regpt.report.summary import summarize

SEEDS = ("train.seed", "data.seed", "sample.seed")
LOWER_IS_BETTER = ("loss", "bpb", "bits_per_byte", "perplexity")
AVERAGED = "averaged weights"
SAME_TOKENS = 1.01  # times as many tokens still are as many: another batch size, a step more
HEADLINE = ("acc_norm", "centered", "acc")  # the metric that an item's `correct` stands for: the first one there is


@dataclass(frozen=True)
class Measure:
    """One final number of both runs.

    Attributes:
        name: `validation loss`, `hellaswag acc_norm`, …
        a, b, step_a, step_b: the values and the steps they were measured at.
        tokens: what A and B had read then; None where that is not known.
        lower: a lower value is better.
        test: whether they differ by more than the sampling of items explains; None for a reason given in `why`.
        seeds: whether they differ by more than seeds explain, where runs of other seeds were given.
    """

    name: str
    a: float
    b: float
    step_a: int
    step_b: int
    lower: bool
    test: Test | None
    why: str
    seeds: SeedNoise | None
    tokens: tuple[float | None, float | None] = (None, None)

    @property
    def equally_trained(self) -> bool:
        """Whether A and B had read as much, as far as the runs say; within a step or two of other batches."""
        known = [x for x in self.tokens if x is not None]
        return len(known) < 2 or max(known) <= SAME_TOKENS * min(known)

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def better(self) -> str:
        """`a`, `b` or `` for equal numbers."""
        if self.difference == 0:
            return ""
        return "b" if (self.difference < 0) == self.lower else "a"

    def conclusion(self) -> str:
        """In words: whether the difference is one."""
        if self.seeds is not None:
            said = "exceeds the noise between seeds" if self.seeds.exceeds else "within the noise between seeds"
        elif self.test is None:
            said = self.why
        else:
            said = "differs" if self.test.significant else "no difference shown"
        return said if self.equally_trained else f"unequal training; {said}"


@dataclass(frozen=True)
class Training:
    """How much of its training a run has done; None where the run does not say."""

    steps: int
    planned: float | None
    tokens: float | None

    @property
    def unfinished(self) -> bool:
        return self.planned is not None and self.steps < self.planned


@dataclass(frozen=True)
class Comparison:
    """Everything that is known of A and B. `others` are the runs of other seeds, of A's and of B's configuration;
    `training` is A's and B's; `equal` their validation where both had last read as much, if one of them went on."""

    a: Run
    b: Run
    others: tuple[tuple[Run, ...], tuple[Run, ...]]
    bits: bool
    config: list[tuple[str, list[Any]]]
    code: list[tuple[str, list[Any]]]
    data: list[tuple[str, list[Any]]]
    measures: list[Measure]
    curve: list[tuple[int, float, float]]  # tokens read, and both validation losses (bits per byte where `bits`) then
    training: tuple[Training, Training]
    equal: Measure | None


def compare(a: Run, b: Run, seeds: Sequence[Run] = ()) -> Comparison:
    """Compare B with A; `seeds` are runs of A's or B's configuration with other seeds.

    Raises:
        UserError: different tokenizers without bits per byte; a run of `seeds` that differs in more than its seeds.
    """
    others = sort_seeds(a, b, seeds)
    runs = [a, b]
    bits = need_bits(runs)
    return Comparison(
        a=a,
        b=b,
        others=others,
        bits=bits,
        config=config_differences(runs),
        code=code_differences(runs),
        data=data_differences(runs),
        measures=measures(a, b, others, bits),
        curve=common_validation(a, b, bits),
        training=(training_of(a), training_of(b)),
        equal=measure_after_equal_tokens(a, b, bits),
    )


def training_of(run: Run) -> Training:
    summary = summarize(run)
    return Training(summary.steps, summary.planned_steps, summary.tokens)


def sort_seeds(a: Run, b: Run, seeds: Sequence[Run]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Each run to the one of A and B whose configuration it repeats."""
    found: tuple[list[Run], list[Run]] = ([], [])
    for run in seeds:
        beside_a, beside_b = beyond_seeds(a, run), beyond_seeds(b, run)
        if beside_a and beside_b:
            fewer, name = min((beside_a, a.name), (beside_b, b.name), key=lambda one: len(one[0]))
            raise UserError(
                f"the run {run.name!r} of --seeds differs from {name!r} in more than its seeds ({', '.join(fewer[:5])}"
                f"{', …' if len(fewer) > 5 else ''}); give runs of the same configuration with other seeds"
            )
        refuse_unequal_seed(b if beside_a else a, run)
        found[bool(beside_a)].append(run)
    return tuple(found[0]), tuple(found[1])


def refuse_unequal_seed(run: Run, seed: Run) -> None:
    """The noise between seeds is that of runs which have read as much."""
    ours, theirs = training_of(run).tokens, training_of(seed).tokens
    if ours and theirs and max(ours, theirs) > SAME_TOKENS * min(ours, theirs):
        raise UserError(
            f"the run {seed.name!r} of --seeds has read {theirs:,.0f} tokens, {run.name!r} {ours:,.0f}; finish the "
            "shorter one, or leave it out"
        )


def beyond_seeds(a: Run, b: Run) -> list[str]:
    """Keys of the configuration in which the runs differ, seeds aside, and of the data."""
    config = [key for key, _ in differing([a.config, b.config]) if key not in (*SEEDS, "data.path")]
    return config + [f"data: {key}" for key, _ in data_differences([a, b])]


# ---- the numbers


@dataclass(frozen=True)
class Final:
    """The last value of a number, with the step it was measured at, its standard error where the run has one, and what
    it was measured on: validation tokens."""

    step: int
    value: float
    stderr: float | None
    measured_on: float | None = None


def finals(run: Run) -> dict[str, Final]:
    """Name → last value, of everything that was measured."""
    found: dict[str, Final] = {}
    for row in run.val:
        keep(found, "validation loss", row, "loss", "stderr")
        keep(found, "bits per byte", row, "bpb", "bpb_stderr")
        keep(found, f"{AVERAGED}: validation loss", row, "loss_ema", "")
        keep(found, f"{AVERAGED}: bits per byte", row, "bpb_ema", "")
    for row in run.val_sources:
        keep(found, f"validation loss, {row['source']}", row, "loss", "stderr")
    for row in run.evals:
        if row.get("metric") != "missing":
            keep(found, f"{row.get('task')} {row.get('metric')}", row, "value", "stderr")
    return found


def keep(found: dict[str, Final], name: str, row: Row, key: str, error: str) -> None:
    value = number(row.get(key))
    if value is not None:
        found[name] = Final(row["step"], value, number(row.get(error)), number(row.get("tokens")))


def measures(a: Run, b: Run, others: tuple[tuple[Run, ...], tuple[Run, ...]], bits: bool) -> list[Measure]:
    """What both runs measured; losses a token are left out where the tokens differ, which have no common unit."""
    groups = [[finals(run) for run in (first, *more)] for first, more in ((a, others[0]), (b, others[1]))]
    (ours, *_), (theirs, *_) = groups
    same_text = not data_differences([a, b])
    pairs = paired_scores(a, b)
    found = []
    for name, x in ours.items():
        if name not in theirs or (bits and is_validation(name) and "bits" not in name):
            continue
        y, validation = theirs[name], is_validation(name)
        comparable = same_text or not validation
        test, why = tested(x, y, pairs(name, (x.step, y.step))) if comparable else (None, "not tested: other data")
        spread = against_seeds(*([one[name].value for one in group if name in one] for group in groups))
        lower = validation or name.rpartition(" ")[2] in LOWER_IS_BETTER
        seen = read_by(a, x.step), read_by(b, y.step)
        spread = spread if comparable else None
        found.append(Measure(name, x.value, y.value, x.step, y.step, lower, test, why, spread, seen))
    return found


def read_by(run: Run, step: int) -> float | None:
    """Tokens read after `step` updates."""
    return positions(run.train, [step]).get("tokens", [None])[0]


def common_validation(a: Run, b: Run, bits: bool) -> list[tuple[int, float, float]]:
    """Both validation losses wherever both runs were validated after as many tokens."""
    ours, theirs = (validation_by_tokens(run, bits) for run in (a, b))
    return [(tokens, ours[tokens].value, theirs[tokens].value) for tokens in sorted(ours.keys() & theirs.keys())]


def measure_after_equal_tokens(a: Run, b: Run, bits: bool) -> Measure | None:
    """The validation of both runs where they last had read as much; None where there is none, or it is their end."""
    ours, theirs = (validation_by_tokens(run, bits) for run in (a, b))
    common = [tokens for tokens in ours.keys() & theirs.keys() if tokens > 0]
    if not common or max(common) == max(ours) == max(theirs):
        return None
    x, y = ours[max(common)], theirs[max(common)]
    name = "bits per byte" if bits else "validation loss"
    test, why = (None, "not tested: other data") if data_differences([a, b]) else tested(x, y, None)
    seen = (float(max(common)), float(max(common)))
    return Measure(name, x.value, y.value, x.step, y.step, True, test, why, None, seen)


def validation_by_tokens(run: Run, bits: bool) -> dict[int, Final]:
    tokens = positions(run.train, [row["step"] for row in run.val]).get("tokens", [])
    found: dict[int, Final] = {}
    for at, row in zip(tokens, run.val):
        one: dict[str, Final] = {}
        keep(one, "", row, "bpb" if bits else "loss", "bpb_stderr" if bits else "stderr")
        if at is not None and one:
            found[int(at)] = one[""]
    return found


def is_validation(name: str) -> bool:
    return name.removeprefix(f"{AVERAGED}: ").startswith(("validation loss", "bits per byte"))


def tested(a: Final, b: Final, scores: tuple[list[float], list[float]] | None) -> tuple[Test | None, str]:
    """The best test that the runs allow."""
    if a.measured_on != b.measured_on and None not in (a.measured_on, b.measured_on):
        return None, f"not tested: validated on {a.measured_on:,.0f} and {b.measured_on:,.0f} tokens"
    if scores is not None:
        return paired_test(*scores), ""
    if a.stderr is not None and b.stderr is not None:
        return unpaired_z(a.value, a.stderr, b.value, b.stderr), ""
    return None, "not tested: no scores"


Scored = tuple[list[float], list[float]] | None


def paired_scores(a: Run, b: Run) -> Callable[[str, tuple[int, int]], Scored]:
    """Name of a measure, and the steps of both runs → the scores of the items that both have kept of these steps."""

    @cache
    def items(task: str, steps: tuple[int, int]) -> tuple[Items, Items] | None:
        ours, theirs = (kept_items(run, task, step) for run, step in zip((a, b), steps))
        return None if ours is None or theirs is None else (ours, theirs)

    def scores(name: str, steps: tuple[int, int]) -> Scored:
        if name.startswith(AVERAGED):
            return None  # of these only the number is kept
        if is_validation(name):
            return validation_scores(items("val", steps), name)
        task, _, metric = name.rpartition(" ")
        both = items(task, steps)
        found = common_scores(*both, metric) if both else None
        if both and found is None and metric == headline(a, b, task):
            found = common_scores(*both, "correct")
        return found

    return scores


def validation_scores(both: tuple[Items, Items] | None, name: str) -> tuple[list[float], list[float]] | None:
    """Losses of the batches that both runs validated on; of one source where `name` ends in one.

    Each is weighted by its tokens (bytes), so that the mean is the whole's loss (bits per byte).
    """
    if both is None:
        return None
    source, bits = name.partition(", ")[2], name.startswith("bits")
    key, weight = ("bpb", "bytes") if bits else ("loss", "tokens")
    ours = {item: row for item, row in both[0].items() if source in ("", row.get("source"))}
    found, weights = common_scores(ours, both[1], key), common_scores(ours, both[1], weight)
    if found is None or weights is None or len(weights[0]) != len(found[0]) or weights[0] != weights[1]:
        return found
    mean = sum(weights[0]) / len(weights[0])
    x, y = ([value * w / mean for value, w in zip(values, weights[0])] for values in found)
    return x, y


def headline(a: Run, b: Run, task: str) -> str | None:
    """The metric of `task` that an item's `correct` stands for."""
    there = {row.get("metric") for run in (a, b) for row in run.evals if row.get("task") == task}
    return next((metric for metric in HEADLINE if metric in there), None)


# ---- as JSON


def to_dict(found: Comparison) -> Row:
    """The comparison for scripts."""
    names = (found.a.name, found.b.name)
    return {
        "a": names[0],
        "b": names[1],
        "seeds": [[run.name for run in group] for group in found.others],
        **{
            part: {key: dict(zip(("a", "b"), values)) for key, values in getattr(found, part)}
            for part in ("config", "code", "data")
        },
        "measures": [measure_dict(one) for one in found.measures],
        "curve": [dict(zip(("tokens", "a", "b"), point)) for point in found.curve],
        "curve_unit": "bits per byte" if found.bits else "nats per token",
        "training": {
            name: asdict(one) | {"unfinished": one.unfinished} for name, one in zip(("a", "b"), found.training)
        },
        "after_equal_tokens": None if found.equal is None else measure_dict(found.equal),
    }


def measure_dict(one: Measure) -> Row:
    return {
        "name": one.name,
        "a": one.a,
        "b": one.b,
        "difference": one.difference,
        "better": one.better or None,
        "step_a": one.step_a,
        "step_b": one.step_b,
        "tokens_a": one.tokens[0],
        "tokens_b": one.tokens[1],
        "equally_trained": one.equally_trained,
        "test": None if one.test is None else asdict(one.test) | {"significant": one.test.significant},
        "seeds": None if one.seeds is None else asdict(one.seeds) | {"exceeds": one.seeds.exceeds},
        "conclusion": one.conclusion(),
    }
