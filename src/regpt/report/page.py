"""A run as one HTML file that needs nothing else: no network, no server, no other file."""

import json
import os
import shlex
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.report.read import Column, Row, Run, build_table, number, positions, read_run, thin_samples
from regpt.report.summary import Tile, section, sentence, summarize, tiles

MAX_TEXT = 4000  # characters of one sample
MAX_EVENTS = 500
# Nothing may be fetched, whatever a sample says; the page's own style and script are inline.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# NUL … US and DEL as the pictures Unicode has for them; newline and tab stay. Half a surrogate pair is no text.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (default `run/report.html`) and return where it is.

    Raises:
        UserError: the run cannot be read (see `read_run`) or `out` cannot be written.
    """
    out = run / "report.html" if out is None else out
    page = render(read_run(run))
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


def render(run: Run) -> str:
    """The page. The same run gives the same bytes."""
    summary = summarize(run)
    body = [
        header(run, sentence(summary), tiles(summary, run.config)),
        '<main><noscript><p class="card note">The charts and samples need JavaScript.</p></noscript>',
        '<section id="charts" aria-label="Charts"></section>',
        '<section id="samples" aria-label="Samples"></section>',
        events_section(run.events),
        config_section(run.config),
        provenance_section(run),
        f"</main><footer>regpt {text(run.env.get('regpt', ''))} · charts by uPlot, under the MIT licence</footer>",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{text(run.name)} · regpt report</title>
<link rel="icon" href="data:,">
<style>
{asset("vendor/uPlot.min.css")}
{asset("report.css")}
</style>
</head>
<body>
{"".join(body)}
<script type="application/json" id="data">{embed(charts(run))}</script>
<script>
/*
uPlot
{asset("vendor/LICENSE-uPlot")}
*/
{asset("vendor/uPlot.iife.min.js")}
</script>
<script>
{asset("report.js")}
</script>
</body>
</html>
"""


def asset(name: str) -> str:
    return files("regpt.report").joinpath(name).read_text(encoding="utf-8").strip()


def visible(value: Any) -> str:
    """`value` as text that a browser shows as it is: control characters by their pictures."""
    return str(value).translate(VISIBLE)


def text(value: Any) -> str:
    """`value` as HTML text, safe between tags and inside a quoted attribute."""
    return escape(visible(value), quote=True)


def embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in: ASCII only, `<`, `>` and `&` escaped.

    ASCII covers U+2028 and U+2029, which end a line in JavaScript.
    """
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---- what the script draws


def charts(run: Run) -> Row:
    """The data of report.js: x axes and columns of one length, the panels that draw them, events and samples."""
    axes, columns = build_table(run)
    return {
        "axes": axes,
        "columns": columns,
        "panels": panels(run, columns),
        "events": events(run),
        "samples": samples(run),
    }


def panels(run: Run, columns: dict[str, Column]) -> list[Row]:
    """The charts in the order they stand; one whose columns hold nothing is left out."""
    noisy = [("raw", "{}", "each step"), ("line", "{}_smooth", "smoothed")]
    unigram, clip = number(run.env.get("unigram_loss")), number(section(run.config, "train").get("grad_clip"))
    drawn = [
        panel(
            "Loss",
            "nats per token",
            "loss",
            [
                ("raw", "loss", "train, each step"),
                ("line", "loss_smooth", "train, smoothed"),
                ("points", "val_loss", "validation"),
            ],
            ("unigram model", unigram),
        ),
        panel("Learning rate", "", "rate", [("line", "lr", "learning rate")]),
        panel("Gradient norm", "before clipping", "norm", fill(noisy, "grad_norm"), ("clipped above", clip or None)),
        panel("Throughput", "tokens/s", "count", fill(noisy, "tokens_per_s")),
        panel("MFU", "model FLOPs utilisation", "percent", fill(noisy, "mfu")),
        panel("Peak memory", "GiB", "gib", [("line", "peak_memory_gib", "peak memory")]),
    ]
    for name in columns:
        if name.startswith("eval:"):
            task, _, metric = name.removeprefix("eval:").partition("/")
            drawn.append(panel(visible(task), visible(metric), "score", [("points", name, visible(metric))]))
    for one in drawn:
        one["series"] = [series for series in one["series"] if series["column"] in columns]
    return [one for one in drawn if one["series"]]


def fill(series: list[tuple[str, str, str]], name: str) -> list[tuple[str, str, str]]:
    return [(role, column.format(name), label) for role, column, label in series]


def panel(
    title: str,
    unit: str,
    form: str,
    series: list[tuple[str, str, str]],
    reference: tuple[str, float | None] = ("", None),
) -> Row:
    """One chart: its series as (role, column, label), a horizontal line where `reference` has a value."""
    label, value = reference
    return {
        "title": title,
        "unit": unit,
        "form": form,
        "series": [{"role": role, "column": column, "label": name} for role, column, name in series],
        "reference": None if value is None else {"label": label, "value": value},
    }


def events(run: Run) -> list[Row]:
    """The newest events with their place on every axis."""
    kept = run.events[-MAX_EVENTS:]
    axes = positions(run.train, [row["step"] for row in kept])
    return [
        {"name": visible(row.get("name", "event")), **{axis: at[i] for axis, at in axes.items()}}
        for i, row in enumerate(kept)
    ]


def samples(run: Run) -> list[Row]:
    """Texts by step: step, prompt, texts, and the validation loss nearest before, when there is one."""
    found = []
    for row in thin_samples(run.samples):
        texts = row.get("texts")
        texts = texts if isinstance(texts, list) else []
        shown = [visible(one if len(one) <= MAX_TEXT else one[:MAX_TEXT] + " …") for one in map(str, texts)]
        found.append({"step": row["step"], "prompt": visible(row.get("prompt") or ""), "texts": shown})
    axes = positions(run.train, [row["step"] for row in found])
    return [row | {axis: at[i] for axis, at in axes.items()} for i, row in enumerate(found)]


# ---- what is plain HTML


def header(run: Run, said: str, figures: list[Tile]) -> str:
    started = number(run.env.get("started"))
    when = "" if started is None else f" · started {date(started)}"
    cells = "".join(map(tile_html, figures))
    return (
        f'<header><p class="eyebrow">regpt · training report{when}</p><h1>{text(run.name)}</h1>'
        f'<p class="said">{text(said)}</p><dl class="tiles">{cells}</dl></header>'
    )


def tile_html(tile: Tile) -> str:
    notes = "".join(f'<span class="note">{text(note)}</span>' for note in tile.notes if note)
    figure = f'<b>{text(tile.value)}</b> <span class="unit">{text(tile.unit)}</span>'
    return f'<div class="tile"><dt>{text(tile.label)}</dt><dd>{figure}{notes}</dd></div>'


def date(seconds: float) -> str:
    """`30 July 2026, 14:03 UTC`: the same wherever the page is opened."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):  # not a time of this calendar
        return text(seconds)
    return f'<time datetime="{moment.isoformat(timespec="seconds")}">{moment.day} {moment:%B %Y, %H:%M} UTC</time>'


def flatten(document: Row, prefix: str = "") -> list[tuple[str, Any]]:
    """Keys and values of a nested table, keys joined with dots."""
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        found += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def grouped(document: Row) -> list[tuple[str, Any]]:
    """`flatten`, with the digits of large counts in groups: 3,210,041."""
    return [(key, f"{value:,}" if type(value) is int else value) for key, value in flatten(document)]


def value_html(value: Any) -> str:
    """A value as TOML or JSON writes it, but strings without quotes."""
    if isinstance(value, str):
        return text(value) if value else '<span class="empty">empty</span>'
    if value is None:
        return '<span class="empty">none</span>'
    return text(json.dumps(value, ensure_ascii=False, default=str))


def table(title: str, rows: list[tuple[str, Any]]) -> str:
    cells = "".join(f'<tr><th scope="row">{text(key)}</th><td>{value_html(value)}</td></tr>' for key, value in rows)
    return f'<div class="card sheet"><h3>{text(title)}</h3><table>{cells}</table></div>'


def config_section(config: Row) -> str:
    if not config:
        return ""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sheets = [table("run", flatten(loose))] if loose else []
    sheets += [table(name, flatten(values)) for name, values in config.items() if isinstance(values, dict) and values]
    return f'<section><h2>Configuration</h2><div class="columns">{"".join(sheets)}</div></section>'


def provenance_section(run: Run) -> str:
    """Where the run came from: command, software, machine, data."""
    argv = run.env.get("argv")
    words = [visible(word) for word in argv] if isinstance(argv, list) else []
    command = f'<pre class="card command"><code>{escape(shlex.join(words))}</code></pre>' if words else ""
    plain = {key: value for key, value in run.env.items() if key not in ("argv", "data", "started")}
    sheets = [table("Environment", grouped(plain))] if plain else []
    data = section(run.env, "data")
    sheets += [table("Data", grouped(data))] if data else []
    if not sheets and not command:
        return ""
    return f'<section><h2>Provenance</h2>{command}<div class="sheets">{"".join(sheets)}</div></section>'


def events_section(rows: list[Row]) -> str:
    if not rows:
        return ""
    cells = []
    for row in rows[-MAX_EVENTS:]:
        more = {key: value for key, value in row.items() if key not in ("kind", "step", "name", "time")}
        when = number(row.get("time"))
        detail = " · ".join(f"{text(key)} {value_html(value)}" for key, value in flatten(more))
        cells.append(
            f"<tr><td>{row['step']:,}</td><td>{text(row.get('name', 'event'))}</td><td>{detail}</td>"
            f"<td>{'' if when is None else date(when)}</td></tr>"
        )
    head = "<thead><tr><th>step</th><th>event</th><th>details</th><th>time</th></tr></thead>"
    body = f'<table class="events">{head}<tbody>{"".join(cells)}</tbody></table>'
    title = f"<summary><h2>Events</h2> <span>{len(rows)}</span></summary>"
    return f'<section><details>{title}<div class="card scroll">{body}</div></details></section>'
