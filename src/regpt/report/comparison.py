"""The parts of a page that speak of several runs: what became of each, and in what they differ."""

from collections.abc import Sequence
from typing import Any

from regpt.report.differences import code_differences, config_differences, data_differences
from regpt.report.health import examine, verdict
from regpt.report.markup import command_html, grid, section_html, text, value_html
from regpt.report.read import Run
from regpt.report.summary import Summary, duration, loss, sentence, si, summarize

HUES = 8  # colours of the style sheet
WORDS = {"good": "healthy", "note": "worth a look", "bad": "something is wrong"}


def header_of_several(runs: Sequence[Run], eyebrow: str = "", said: str = "") -> str:
    kind = eyebrow or f"regpt · {len(runs)} runs"
    sentence = f'<p class="said">{text(said)}</p>' if said else ""
    return f'<header><p class="eyebrow">{text(kind)}</p><h1>{text(title(runs))}</h1>{sentence}{overview(runs)}</header>'


def title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return " · ".join(names) if len(names) <= 3 else f"{names[0]} · {names[1]} · {len(names) - 2} more"


def overview(runs: Sequence[Run]) -> str:
    """A row a run, in the colour of its lines."""
    figures = ("parameters", "tokens", "validation loss", "bits per byte", "training loss", "tokens/s", "MFU", "time")
    rows = [overview_row(i, run, summarize(run)) for i, run in enumerate(runs)]
    return f'<div class="overview">{grid(("run", *figures), rows)}</div>'


def swatch(run: int) -> str:
    """A run's colour, as in the charts, where a ninth has the first one again, dashed; nothing for -1."""
    return f'<span class="swatch" data-hue="{run % HUES}"></span>' if run >= 0 else ""


def overview_row(i: int, run: Run, summary: Summary) -> list[str]:
    level, said = verdict(examine(run))
    name = f'{swatch(i)}{text(run.name)} <span class="chip {level}" title="{text(said)}">{WORDS[level]}</span>'
    val = None if summary.last_val is None else loss(summary.last_val[1])
    bpb = None if summary.last_bpb is None else f"{summary.last_bpb:.4f}"
    train = None if summary.train_loss is None else loss(summary.train_loss)
    mfu = None if summary.mfu is None else f"{100 * summary.mfu:.1f} %"
    speed, seconds = summary.tokens_per_s, summary.seconds
    cells = [summary.parameters and si(summary.parameters), summary.tokens and si(summary.tokens), val, bpb, train]
    cells += [None if speed is None else si(speed), mfu, None if seconds is None else duration(seconds)]
    return [name, *("–" if cell is None else text(cell) for cell in cells)]


def sections_of_several(runs: Sequence[Run]) -> str:
    return verdicts(runs) + differences_sections(runs) + commands(runs)


def verdicts(runs: Sequence[Run]) -> str:
    """What happened, a paragraph a run."""
    said = "".join(
        f'<div class="card story"><h3>{swatch(i)}{text(run.name)}</h3>'
        f'<p>{text(sentence(summarize(run)))}</p><p class="note">{text(verdict(examine(run))[1])}</p></div>'
        for i, run in enumerate(runs)
    )
    return section_html("What happened", f'<div class="sheets">{said}</div>')


def differences_sections(runs: Sequence[Run]) -> str:
    """Tables of configuration, code and data, of what differs only."""
    return "".join(
        section_html(name, differences_table(runs, rows, same))
        for name, rows, same in (
            ("Differing configuration", config_differences(runs), "The configurations are the same."),
            ("Differing code and machine", code_differences(runs), "Versions, commit and device are the same."),
            ("Differing data", data_differences(runs), "The data are the same."),
        )
    )


def differences_table(runs: Sequence[Run], rows: Sequence[tuple[str, list[Any]]], same: str) -> str:
    if not rows:
        return f'<p class="note">{same}</p>'
    head = ["key", *(f"{swatch(i)}{text(run.name)}" for i, run in enumerate(runs))]
    return grid(head, [[text(key), *map(value_html, values)] for key, values in rows], numbers=False)


def commands(runs: Sequence[Run]) -> str:
    said = [(run.name, command_html(run.env.get("argv"))) for run in runs]
    return section_html("Commands", "".join(f"<h3>{text(name)}</h3>{command}" for name, command in said if command))
