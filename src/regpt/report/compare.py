"""Two runs against each other: what differs between them, and which final numbers differ by more than chance."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from regpt.errors import UserError
from regpt.report.bits import need_bits
from regpt.report.differences import code_differences, config_differences, data_differences, differing
from regpt.report.items import Items, common_scores, item_files, read_items, task_file_name
from regpt.report.read import Row, Run, number
from regpt.report.series import positions
from regpt.report.significance import SeedNoise, Test, against_seeds, paired_test, unpaired_z

SEEDS = ("train.seed", "data.seed", "sample.seed")
LOWER_IS_BETTER = ("loss", "bpb", "bits_per_byte", "perplexity")
AVERAGED = "averaged weights"
HEADLINE = ("acc_norm", "centered", "acc")  # the metric that an item's `correct` stands for: the first one there is


@dataclass(frozen=True)
class Measure:
    """One final number of both runs.

    Attributes:
        name: `validation loss`, `hellaswag acc_norm`, …
        a, b, step_a, step_b: the values and the steps they were measured at.
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
            return "exceeds the noise between seeds" if self.seeds.exceeds else "within the noise between seeds"
        if self.test is None:
            return self.why
        return "differs" if self.test.significant else "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """Everything that is known of A and B. `others` are the runs of other seeds, of A's and of B's configuration."""

    a: Run
    b: Run
    others: tuple[tuple[Run, ...], tuple[Run, ...]]
    bits: bool
    config: list[tuple[str, list[Any]]]
    code: list[tuple[str, list[Any]]]
    data: list[tuple[str, list[Any]]]
    measures: list[Measure]
    curve: list[tuple[int, float, float]]  # tokens read, and both validation losses (bits per byte where `bits`) then


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
    )


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
        found[bool(beside_a)].append(run)
    return tuple(found[0]), tuple(found[1])


def beyond_seeds(a: Run, b: Run) -> list[str]:
    """Keys of the configuration in which the runs differ, seeds aside, and of the data."""
    config = [key for key, _ in differing([a.config, b.config]) if key not in (*SEEDS, "data.path")]
    return config + [f"data: {key}" for key, _ in data_differences([a, b])]


# ---- the numbers


@dataclass(frozen=True)
class Final:
    """The last value of a number, with the step it was measured at and its standard error where the run has one."""

    step: int
    value: float
    stderr: float | None


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
        found[name] = Final(row["step"], value, number(row.get(error)))


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
        test, why = tested(x, y, pairs(name)) if comparable else (None, "not tested: other data")
        spread = against_seeds(*([one[name].value for one in group if name in one] for group in groups))
        lower = validation or name.rpartition(" ")[2] in LOWER_IS_BETTER
        found.append(Measure(name, x.value, y.value, x.step, y.step, lower, test, why, spread if comparable else None))
    return found


def common_validation(a: Run, b: Run, bits: bool) -> list[tuple[int, float, float]]:
    """Both validation losses wherever both runs were validated after as many tokens."""
    ours, theirs = (validation_by_tokens(run, "bpb" if bits else "loss") for run in (a, b))
    return [(tokens, ours[tokens], theirs[tokens]) for tokens in sorted(ours.keys() & theirs.keys())]


def validation_by_tokens(run: Run, key: str) -> dict[int, float]:
    steps = [row["step"] for row in run.val]
    tokens = positions(run.train, steps).get("tokens", [])
    return {int(at): value for at, row in zip(tokens, run.val) if at is not None and (value := number(row.get(key)))}


def is_validation(name: str) -> bool:
    return name.removeprefix(f"{AVERAGED}: ").startswith(("validation loss", "bits per byte"))


def tested(a: Final, b: Final, scores: tuple[list[float], list[float]] | None) -> tuple[Test | None, str]:
    """The best test that the runs allow."""
    if scores is not None:
        return paired_test(*scores), ""
    if a.stderr is not None and b.stderr is not None:
        return unpaired_z(a.value, a.stderr, b.value, b.stderr), ""
    return None, "not tested: no scores"


def paired_scores(a: Run, b: Run) -> Callable[[str], tuple[list[float], list[float]] | None]:
    """Name of a measure → the scores of the items that both runs have kept, of their last steps."""
    files = item_files(a), item_files(b)
    read = cache(read_items)

    def items(task: str) -> tuple[Items, Items] | None:
        key = task_file_name(task)
        return (read(files[0][key]), read(files[1][key])) if key in files[0] and key in files[1] else None

    def scores(name: str) -> tuple[list[float], list[float]] | None:
        if name.startswith(AVERAGED):
            return None  # of these only the number is kept
        if is_validation(name):
            return validation_scores(items("val"), name)
        task, _, metric = name.rpartition(" ")
        both = items(task)
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
        "test": None if one.test is None else asdict(one.test) | {"significant": one.test.significant},
        "seeds": None if one.seeds is None else asdict(one.seeds) | {"exceeds": one.seeds.exceeds},
        "conclusion": one.conclusion(),
    }
