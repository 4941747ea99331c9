"""`regpt diff`: two runs against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import parse
from regpt.cli.report import refuse_other_than_html, refuse_twice
from regpt.console.lines import print_json, print_line, print_rows
from regpt.ranges import evenly

if TYPE_CHECKING:
    from regpt.report.compare import Measure, RunComparison

MAX_CURVE = 8  # rows of the terminal's table of losses


@dataclass(frozen=True)
class DiffArgs:
    """Compare two runs: what differs in configuration, code and data; curves; final numbers with paired tests."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_A")]
    """Run folder to compare with, or its address (s3://…)."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_B")]
    """Run folder that is compared; differences are B - A."""
    seeds: tuple[str, ...] = ()
    """Runs of A's or B's configuration with other seeds: does the difference exceed the noise between them?"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Also write the comparison, with the curves of both runs, as one HTML page."""
    json: bool = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(DiffArgs, args, prog="regpt diff")
    names = (given.a, given.b, *given.seeds)
    refuse_twice(names)
    refuse_other_than_html(given.out)
    from regpt.checkpoint.fetch import local_run
    from regpt.report.compare import compare
    from regpt.report.read import read_run, with_own_names
    from regpt.report.statistics import scipy_stats

    scipy_stats()  # refused before any work where it is missing
    a, b, *others = with_own_names([read_run(local_run(name)) for name in names])
    found = compare(a, b, others)
    if given.json:
        print_json(comparison_dict(found), default=str)
    else:
        print_comparison(found)
    if given.out is not None:
        from regpt.report.page import write_diff

        page = write_diff(found, given.out)
        if not given.json:
            print_line(page)
    return 0


def print_comparison(found: RunComparison) -> None:
    from regpt.report.compare import HEAD, SEEDS_HEAD, headline_of_runs, measure_cells, seeds_rows

    print_line(f"A {found.a.name}\nB {found.b.name}\n\n{headline_of_runs(found)}")
    print_part("final numbers", HEAD, [measure_cells(one) for one in found.measures], left=(0, 5, 7))
    print_part("against the noise between seeds", SEEDS_HEAD, seeds_rows(found), left=(0, 5))
    unit = "bits per byte" if found.bits else "validation loss"
    rows = [[f"{tokens:,}", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for tokens, a, b in evenly(found.curve, MAX_CURVE)]
    print_part(f"{unit} after as many tokens", ("tokens", "A", "B", "B - A"), rows)
    words = {"config": "configuration", "code": "code and machine", "data": "data"}
    for part, differing in found.differing.items():
        rows = [[key, *map(shown, values)] for key, values in differing]
        print_part(f"differing {words[part]}", ("key", "A", "B"), rows, left=(0, 1, 2))
        if not rows:
            print_line(f"\n{words[part]}: the same")


def print_part(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    if rows:
        print_line(f"\n{title}")
        print_rows(head, rows, left)


def shown(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def comparison_dict(found: RunComparison) -> dict[str, Any]:
    """The comparison for scripts."""
    training = [
        {"steps": one.steps, "planned": one.planned_steps, "tokens": one.tokens, "unfinished": one.unfinished}
        for one in found.training
    ]
    return {
        "a": found.a.name,
        "b": found.b.name,
        "seeds": [[run.name for run in group] for group in found.seeds],
        **{part: {key: dict(zip("ab", values)) for key, values in rows} for part, rows in found.differing.items()},
        "measures": [measure_dict(one) for one in found.measures],
        "curve": [dict(zip(("tokens", "a", "b"), point)) for point in found.curve],
        "curve_unit": "bits per byte" if found.bits else "nats per token",
        "training": dict(zip("ab", training)),
        "after_equal_tokens": None if found.equal is None else measure_dict(found.equal),
    }


def measure_dict(one: Measure) -> dict[str, Any]:
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
