"""Runs as one HTML file that needs nothing else: no network, no server, no other file."""

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import regpt
from regpt.errors import UserError
from regpt.report.charts import MAX_EVENTS, charts
from regpt.report.comparison import header_of_several, sections_of_several
from regpt.report.health import Finding, examine, verdict
from regpt.report.markup import (
    command_html,
    date,
    embed,
    flatten,
    grid,
    grouped,
    section_html,
    sheet,
    text,
    tile_html,
    value_html,
)
from regpt.report.read import Row, Run, number, read_run, section
from regpt.report.references import task_references
from regpt.report.summary import sentence, summarize, tiles

SCRIPTS = ("numbers.js", "charts.js", "samples.js", "report.js")
# Nothing may be fetched, whatever a sample says; the page's own style and script are inline.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (default `run/report.html`) and return where it is.

    Raises:
        UserError: the run cannot be read (see `read_run`) or `out` cannot be written.
    """
    return write_page(render([read_run(run)]), run / "report.html" if out is None else out)


def write_overlay(runs: Sequence[Path], out: Path) -> Path:
    """Write one report of several runs, drawn over each other; return where it is.

    Raises:
        UserError: as `write_report`; or different tokenizers, and a run without bits per byte.
    """
    return write_page(render(with_own_names([read_run(run) for run in runs])), out)


def with_own_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name told apart by the folder above, or by a number."""
    named: list[Run] = []
    for i, run in enumerate(runs):
        clash = [other.name for other in runs].count(run.name) > 1
        name = f"{run.folder.resolve().parent.name}/{run.name}" if clash else run.name
        if any(name == other.name for other in named):
            name = f"{name} ({i + 1})"
        named.append(Run(**{**run.__dict__, "name": name}))
    return named


def write_page(page: str, out: Path) -> Path:
    """Write `page` to `out` whole or not at all; return `out`."""
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"report {str(out)!r} cannot be written ({error.strerror}); choose another file with --out"
        ) from None
    return out


def render(runs: Sequence[Run]) -> str:
    """The page. The same runs give the same bytes."""
    if len(runs) == 1:
        return document(runs[0].name, header(runs[0]), "", sections(runs[0]), charts(runs))
    title = " · ".join(run.name for run in runs)
    return document(title, header_of_several(runs), "", sections_of_several(runs), charts(runs))


def document(title: str, head: str, above: str, below: str, data: Row) -> str:
    """A whole page: `head`, sections `above` the charts of `data` (see `charts`), and sections `below` them."""
    main = (
        '<main><noscript><p class="card note">The charts and samples need JavaScript.</p></noscript>'
        f'{above}<section id="charts" aria-label="Charts"></section>'
        f'<section id="samples" aria-label="Samples"></section>{below}</main>'
        f"<footer>regpt {regpt.__version__} · charts by uPlot, under the MIT licence</footer>"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{text(title)} · regpt report</title>
<link rel="icon" href="data:,">
<style>
{asset("vendor/uPlot.min.css")}
{asset("report.css")}
</style>
</head>
<body>
{head}{main}
<script type="application/json" id="data">{embed(data)}</script>
<script>
/*
uPlot
{asset("vendor/LICENSE-uPlot")}
*/
{asset("vendor/uPlot.iife.min.js")}
</script>
<script>
(() => {{
"use strict";
{"".join(asset(name) for name in SCRIPTS)}
}})();
</script>
</body>
</html>
"""


def asset(name: str) -> str:
    return files("regpt.report").joinpath(name).read_text(encoding="utf-8").strip() + "\n"


# ---- one run


def header(run: Run) -> str:
    summary = summarize(run)
    started = number(run.env.get("started"))
    when = "" if started is None else f" · started {date(started)}"
    cells = "".join(map(tile_html, tiles(summary, run.config)))
    return (
        f'<header><p class="eyebrow">regpt · training report{when}</p><h1>{text(run.name)}</h1>'
        f'<p class="said">{text(sentence(summary))}</p>{health_html(examine(run))}'
        f'<dl class="tiles">{cells}</dl></header>'
    )


def health_html(findings: list[Finding]) -> str:
    """The verdict; all findings under it where it does not name them itself."""
    level, said = verdict(findings)
    rest = [one for one in findings if one.level != level]
    more = "".join(f'<li class="{one.level}">{text(one.text)}</li>' for one in rest)
    return f'<div class="health {level}"><p>{text(said)}</p>{f"<ul>{more}</ul>" if more else ""}</div>'


def sections(run: Run) -> str:
    return evaluations_section(run) + events_section(run.events) + config_section(run.config) + provenance_section(run)


def evaluations_section(run: Run) -> str:
    """The last value of every task and metric, its standard error, the items scored and left out, other models."""
    last = {(str(row.get("task")), str(row.get("metric"))): row for row in run.evals}  # ascending: the last one stays
    rows = []
    for (task, metric), row in last.items():
        value, error, items, left_out = (number(row.get(key)) for key in ("value", "stderr", "n", "left_out"))
        if value is None and not left_out:
            continue
        others = " · ".join(f"{one.label} {one.value:g}" for one in task_references(task, metric))
        shown = "–" if value is None else f"{value:,.0f}" if metric == "missing" else f"{value:.4f}"
        shown += "" if error is None else f' <span class="note">± {error:.4f}</span>'
        count = "" if items is None else f"{items:,}"
        count += f'<br><span class="note">{left_out:,} left out</span>' if left_out else ""
        missing = row.get("missing")
        named = f'<br><span class="note">without {text(", ".join(map(str, missing)))}</span>' if missing else ""
        rows.append((text(task), text(metric) + named, shown, count, f"{row['step']:,}", text(others)))
    head = ("task", "metric", "value", "items", "step", "for comparison")
    return section_html("Evaluations", grid(head, rows) if rows else "")


def config_section(config: Row) -> str:
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sheets = [sheet("run", flatten(loose))] if loose else []
    sheets += [sheet(name, flatten(values)) for name, values in config.items() if isinstance(values, dict) and values]
    return section_html("Configuration", f'<div class="columns">{"".join(sheets)}</div>' if sheets else "")


def provenance_section(run: Run) -> str:
    """Where the run came from: command, software, machine, data."""
    plain = {key: value for key, value in run.env.items() if key not in ("argv", "data", "started")}
    sheets = [sheet("Environment", grouped(plain))] if plain else []
    data = section(run.env, "data")
    sheets += [sheet("Data", grouped(data))] if data else []
    content = command_html(run.env.get("argv")) + (f'<div class="sheets">{"".join(sheets)}</div>' if sheets else "")
    return section_html("Provenance", content)


def events_section(rows: list[Row]) -> str:
    if not rows:
        return ""
    cells = []
    for row in rows[-MAX_EVENTS:]:
        more = {key: value for key, value in row.items() if key not in ("kind", "step", "name", "time")}
        when = number(row.get("time"))
        detail = " · ".join(f"{text(key)} {value_html(value)}" for key, value in flatten(more))
        name = text(row.get("name", "event"))
        cells.append((f"{row['step']:,}", name, detail, "" if when is None else date(when)))
    title = f"<summary><h2>Events</h2> <span>{len(rows)}</span></summary>"
    table = grid(("step", "event", "details", "time"), cells, numbers=False)
    return f"<section><details>{title}{table}</details></section>"
