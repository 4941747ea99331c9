"""Runs as one HTML file that needs nothing else: no network, no server, no other file.

One run has a report; several runs are drawn over each other; two runs that were compared also have their final numbers.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

import regpt
from regpt.console.text import duration, si
from regpt.files import write_errors, write_text
from regpt.report.charts import MAX_EVENTS, charts, task_references, with_difference
from regpt.report.compare import HEAD, SEEDS_HEAD, RunComparison, headline_of_runs, measure_cells, seeds_rows
from regpt.report.health import examine, verdict
from regpt.report.markup import command_html, date, embed_json, grid, grouped, section_html, sheet, text, value_html
from regpt.report.masks import masks_section
from regpt.report.needle import needle_section
from regpt.report.read import Row, RunData, differences, flatten, number, read_run, section, with_own_names
from regpt.report.summary import RunSummary, Tile, loss, sentence, summarize, tiles

SCRIPTS = ("numbers.js", "charts.js", "samples.js", "report.js")
# Nothing may be fetched, whatever a sample holds; the page's own style and script are inline.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HUES = 8  # colours of the style sheet
WORDS = {"good": "healthy", "note": "worth a look", "bad": "something is wrong"}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (default `run/report.html`) and return its path.

    Raises:
        UserError: the run cannot be read (see `read_run`) or `out` cannot be written.
    """
    return write_page(render([read_run(run)]), run / "report.html" if out is None else out)


def write_overlay(runs: Sequence[Path], out: Path) -> Path:
    """Write one report of several runs, drawn over each other; return its path.

    Raises:
        UserError: as `write_report`; or different tokenizers, and a run without bits per byte.
    """
    return write_page(render(with_own_names([read_run(run) for run in runs])), out)


def write_diff(found: RunComparison, out: Path) -> Path:
    """Write the page of a comparison, the final numbers above the curves of both runs; return its path."""
    return write_page(render([found.a, found.b], found), out)


def write_page(page: str, out: Path) -> Path:
    """Replace `out` atomically; return it."""
    remedy = "choose another file with --out"
    with write_errors(out, remedy):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page, remedy)
    return out


def render(runs: Sequence[RunData], compared: RunComparison | None = None) -> str:
    """The page of one run or several; `compared` is the comparison of two. The same runs give the same bytes."""
    data = charts(runs)
    if len(runs) == 1:
        run = runs[0]
        below = [evaluations_section(run), needle_section(run), masks_section(run), events_section(run.events)]
        below.append(config_section(run.config))
        return document(run.name, header(run), "", "".join([*below, provenance_section(run)]), data)
    title = " · ".join(run.name for run in runs)
    if compared is None:
        head, above = overview(runs, f"regpt · {len(runs)} runs"), ""
    else:
        head, above = overview(runs, "regpt · B against A", headline_of_runs(compared)), measures_sections(compared)
        data = with_difference(data, compared.bits)
    below = stories_section(runs) + differences_sections(runs) + commands_section(runs)
    return document(title, head, above, below, data)


def document(title: str, head: str, above: str, below: str, data: Row) -> str:
    """A whole page: `head`, sections `above` the charts of `data` (see `charts`), and sections `below` them."""
    return Template(asset("page.html")).substitute(
        title=text(title),
        policy=POLICY,
        style=asset("vendor/uPlot.min.css") + asset("report.css").rstrip(),
        head=head,
        above=above,
        below=below,
        version=regpt.__version__,
        data=embed_json(data),
        licence=asset("vendor/LICENSE-uPlot").rstrip(),
        uplot=asset("vendor/uPlot.iife.min.js").rstrip(),
        script="".join(map(asset, SCRIPTS)).rstrip(),
    )


def asset(name: str) -> str:
    return files("regpt.report").joinpath(name).read_text(encoding="utf-8").strip() + "\n"


# ---- one run


def header(run: RunData) -> str:
    """Summary, health and figures; all findings under the verdict where it does not name them itself."""
    summary, findings = summarize(run), examine(run)
    started = number(run.env.get("started"))
    when = "" if started is None else f" · started {date(started)}"
    level, judged = verdict(findings)
    more = "".join(f'<li class="{one.level}">{text(one.text)}</li>' for one in findings if one.level != level)
    return (
        f'<header><p class="eyebrow">regpt · training report{when}</p><h1>{text(run.name)}</h1>'
        f'<p class="said">{text(sentence(summary))}</p>'
        f'<div class="health {level}"><p>{text(judged)}</p>{f"<ul>{more}</ul>" if more else ""}</div>'
        f'<dl class="tiles">{"".join(map(tile_html, tiles(summary, run.config)))}</dl></header>'
    )


def tile_html(tile: Tile) -> str:
    notes = "".join(f'<span class="note">{text(note)}</span>' for note in tile.notes if note)
    figure = f'<b>{text(tile.value)}</b> <span class="unit">{text(tile.unit)}</span>'
    return f'<div class="tile"><dt>{text(tile.label)}</dt><dd>{figure}{notes}</dd></div>'


def evaluations_section(run: RunData) -> str:
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


def provenance_section(run: RunData) -> str:
    """Origin of the run: command, software, machine, data."""
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


# ---- several runs


def overview(runs: Sequence[RunData], eyebrow: str, headline: str = "") -> str:
    """The header of several runs: a table with a row a run, in the colour of its lines."""
    names = [run.name for run in runs]
    title = " · ".join(names) if len(names) <= 3 else f"{names[0]} · {names[1]} · {len(names) - 2} more"
    figures = ("parameters", "tokens", "validation loss", "bits per byte", "training loss", "tokens/s", "MFU", "time")
    table = grid(("run", *figures), [overview_row(i, run, summarize(run)) for i, run in enumerate(runs)])
    lead = f'<p class="said">{text(headline)}</p>' if headline else ""
    top = f'<p class="eyebrow">{text(eyebrow)}</p><h1>{text(title)}</h1>'
    return f'<header>{top}{lead}<div class="overview">{table}</div></header>'


def swatch(run: int) -> str:
    """A run's colour, as in the charts, where a ninth has the first one again, dashed; empty for -1."""
    return f'<span class="swatch" data-hue="{run % HUES}"></span>' if run >= 0 else ""


def overview_row(i: int, run: RunData, summary: RunSummary) -> list[str]:
    level, judged = verdict(examine(run))
    name = f'{swatch(i)}{text(run.name)} <span class="chip {level}" title="{text(judged)}">{WORDS[level]}</span>'
    last_val = None if summary.last_val is None else summary.last_val[1]
    cells = [
        summary.parameters and si(summary.parameters),
        summary.tokens and si(summary.tokens),
        None if last_val is None else loss(last_val),
        None if summary.last_bpb is None else f"{summary.last_bpb:.4f}",
        None if summary.train_loss is None else loss(summary.train_loss),
        None if summary.tokens_per_s is None else si(summary.tokens_per_s),
        None if summary.mfu is None else f"{100 * summary.mfu:.1f} %",
        None if summary.seconds is None else duration(summary.seconds),
    ]
    return [name, *("–" if cell is None else text(cell) for cell in cells)]


def measures_sections(found: RunComparison) -> str:
    """The final numbers of a comparison, and the noise between seeds."""
    named = [swatch("AB".find(name)) + text(name) for name in HEAD]
    rows = [[text(cell) for cell in measure_cells(one)] for one in found.measures]
    seeds = [[text(cell) for cell in row] for row in seeds_rows(found)]
    return section_html("Final numbers", grid(named, rows) if rows else "") + section_html(
        "Against the noise between seeds", grid([text(name) for name in SEEDS_HEAD], seeds) if seeds else ""
    )


def stories_section(runs: Sequence[RunData]) -> str:
    """A paragraph a run."""
    stories = "".join(
        f'<div class="card story"><h3>{swatch(i)}{text(run.name)}</h3>'
        f'<p>{text(sentence(summarize(run)))}</p><p class="note">{text(verdict(examine(run))[1])}</p></div>'
        for i, run in enumerate(runs)
    )
    return section_html("What happened", f'<div class="sheets">{stories}</div>')


def differences_sections(runs: Sequence[RunData]) -> str:
    """Tables of the keys of configuration, code and data that differ."""
    head = ["key", *(f"{swatch(i)}{text(run.name)}" for i, run in enumerate(runs))]
    words = {
        "config": ("Differing configuration", "The configurations are the same."),
        "code": ("Differing code and machine", "Versions, commit and device are the same."),
        "data": ("Differing data", "The data are the same."),
    }
    found = ""
    for part, rows in differences(runs).items():
        title, same = words[part]
        table = grid(head, [[text(key), *map(value_html, values)] for key, values in rows], numbers=False)
        found += section_html(title, table if rows else f'<p class="note">{same}</p>')
    return found


def commands_section(runs: Sequence[RunData]) -> str:
    commands = [(run.name, command_html(run.env.get("argv"))) for run in runs]
    return section_html("Commands", "".join(f"<h3>{text(name)}</h3>{command}" for name, command in commands if command))
