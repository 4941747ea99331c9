"""`regpt bench ladder`: the same step over and over, one change faster each time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from regpt.config import RunConfig
from regpt.model.ops import PLAIN
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.bench import INVENTED, Progress, Window, opened_data, opened_trainer, shortened, start_afresh
from regpt.runs.build import Corpus
from regpt.runs.folder import device_name, source_commit
from regpt.tools.bench.ladder import (
    EXPLICIT,
    LadderRung,
    RungSetup,
    climb,
    is_lectures,
    missing_for,
    unfused,
    with_factors,
)
from regpt.tools.bench.steps import library_versions, percentiles, time_steps
from regpt.train.memory import peak_memory_gib

Report = dict[str, Any]


def bench_ladder(
    config: RunConfig,
    rungs: Sequence[LadderRung],
    window: Window,
    *,
    name: str,
    rows: int,
    progress: Progress,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Time `rungs` on `rows` rows a step of `config`'s model, one after another in this process; the report.

    Args:
        name: what the user called the configuration.
        keep: called with the report so far after each rung, so that a failure of the next loses nothing.
    """
    tokens = rows * config.data.seq_len
    first = changed(config, {"train.batch_tokens": tokens, "train.micro_batch_rows": rows})
    with open_mesh(config.train.device) as mesh, opened_data(shortened(first, window)) as (first, corpus):
        progress("what this device can do")
        climbed = climb(
            rungs,
            lambda need: missing_for(need, mesh.device, config.model),
            partial(value_in, config),
            config.model.vocab_size,
        )
        head = heading(config, mesh, window, name, rows)
        done: list[Report] = []
        for number, (rung, setup) in enumerate(climbed, start=1):
            say = prefixed(progress, f"rung {number} of {len(climbed)}, {rung.name}: ")
            done.append(climb_rung(first, rung, setup, mesh, corpus, window, say))
            keep(head | {"rungs": with_factors(done)})
    return head | {"rungs": with_factors(done)}


def prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda text: progress(prefix + text)


def heading(config: RunConfig, mesh: Mesh, window: Window, name: str, rows: int) -> Report:
    """What the rungs have in common."""
    tokens = rows * config.data.seq_len
    return {
        "kind": "bench ladder",
        "model_name": name,
        "model": asdict(config.model),
        "device": device_name(mesh.device),
        "data": INVENTED,
        "rows": rows,
        "seq_len": config.data.seq_len,
        "tokens": tokens,
        "steps": window.steps,
        "warmup": window.warmup,
        "lectures": is_lectures(config.model, tokens, config.data.seq_len),
        "versions": {**library_versions(), "commit": source_commit()},
    }


def climb_rung(
    first: RunConfig,
    rung: LadderRung,
    setup: RungSetup | str,
    mesh: Mesh,
    corpus: Corpus,
    window: Window,
    progress: Progress,
) -> Report:
    """One row of the ladder; `ms` is the time of a step's tokens of `first`, whatever the rung's own batch."""
    row: Report = {"name": rung.name, "lecture_ms": rung.lecture_ms}
    if isinstance(setup, str):
        return row | {"skipped": setup}
    start_afresh(mesh.device)
    config = changed(first, setup.changes)
    ops = EXPLICIT if setup.attention == "explicit" else PLAIN
    progress("building")
    with opened_trainer(config, mesh, corpus, ops, unfused if setup.adamw == "default" else unchanged) as trainer:
        wanted = trainer.micro_batch.rows
        times = time_steps(trainer, window.warmup, progress)
        ms = percentiles(times.steady_ms)
        share = first.train.batch_tokens / config.train.batch_tokens
        return row | {
            "setup": {**setup.changes, "attention": setup.attention, "adamw": setup.adamw},
            "ms": ms["median"] * share,
            "p10": ms["p10"] * share,
            "p90": ms["p90"] * share,
            "spread": ms["spread"],
            "tokens_per_s": config.train.batch_tokens / ms["median"] * 1e3,
            "batch_tokens": config.train.batch_tokens,
            "rows": trainer.micro_batch.rows,
            "rows_wanted": wanted,
            "first_step_s": times.first_s,
            "peak_memory_gib": peak_memory_gib(mesh.device) if mesh.device.type == "cuda" else None,
            "loss": times.rows[-1]["loss"],
        }


def unchanged(optimizer: Any) -> Any:
    return optimizer


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with other values, by keys such as `train.precision`."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def value_in(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
