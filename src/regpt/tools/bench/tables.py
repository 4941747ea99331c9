"""The reports of `regpt bench` as tables for a terminal; the ladder as a picture, too."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from regpt.console.text import counted
from regpt.data.picture import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LECTURE_NOTE = 'lecture: milliseconds on one A100 in "Let\'s reproduce GPT-2 (124M)" (Karpathy 2024)'


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def train_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench train`."""
    title = f"{report['recipe']}: {report['parameters']:,} parameters on {report['world_size']} × {report['device']}"
    return pairs(title, [*speed_rows(report), *start_rows(report), *active_rows(report)])


def speed_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    ms, processes = report["step_ms"], report["world_size"]
    each = f" ({report['tokens_per_s_per_device']:,.0f} each of {processes})" if processes > 1 else ""
    product, memory, listed = report["product"], report["peak_memory_gib"], report["data_sheet"]
    sheet = f"{report['mfu']:.1%} of {listed['tflops']:,.4g} TFLOP/s, dense {listed['precision']}" if listed else None
    measured = f"{product['tflops']:,.4g} TFLOP/s that a {product['n']}³ {product['precision']} product reached here"
    return [
        ("tokens/s", f"{report['tokens_per_s']:,.0f}{each}"),
        (
            "a step",
            f"{ms['median']:,.1f} ms (p10 {ms['p10']:,.1f}, p90 {ms['p90']:,.1f}, spread {ms['spread']:.1%}), "
            f"{counted(report['steps'], 'step')} after {report['warmup']}",
        ),
        ("MFU, data sheet", sheet or "this device has none in the table"),
        ("of a product", f"{report['share_of_product']:.1%} of {measured}"),
        ("peak memory", "not counted on this system" if memory is None else f"{memory:.2f} GiB{memory_of(report)}"),
    ]


def memory_of(report: dict[str, Any]) -> str:
    whose = {"gpu": " on the GPU", "process": " of the process"}[report["peak_memory_of"]]
    return whose + (", the largest of all processes" if report["world_size"] > 1 else "")


def start_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    first = report["first_step"]
    cache = f" ({first['compile_cache']} cache)" if first["compile_cache"] else ""
    parts = (
        f"imports {first['imports_s']:.1f}, building {first['building_s']:.1f}, "
        f"compilation {first['compile_s']:.1f}{cache}, the rest of the update {first['update_s']:.1f}"
    )
    return [("first step after", f"{first['total_s']:.1f} s: {parts}")]


def active_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    found = report["versions"]
    kernels = report["kernels"]
    attention = f", attention {report['attention']}" if report["attention"] else ""
    names = [f"{name} {found[name]}" for name in ("torch", "cuda", "cudnn", "triton", "python") if found[name]]
    return [
        (
            "batch",
            f"{report['batch_tokens']:,} tokens: {report['accumulation']} × {report['world_size']} × "
            f"{counted(report['micro_batch_rows'], 'row')} of {report['seq_len']}; {report['data']}",
        ),
        (
            "active",
            f"{report['precision']}, {kernels['name']} kernels ({kernels['reason']})"
            f"{', compiled' if report['compile'] else ''}{attention}, "
            f"{'fused ' if report['fused_adamw'] else ''}AdamW",
        ),
        ("versions", ", ".join(names)),
    ]


def ladder_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench ladder`."""
    what = f"{counted(report['tokens'], 'token')}, median of {counted(report['steps'], 'step')}"
    title = Text(f"{report['model_name']} on {report['device']}: {what}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    memory = any(rung.get("peak_memory_gib") for rung in report["rungs"])
    table.add_column("rung", no_wrap=True)
    for heading in ["ms", "p10–p90", "× before", "× first", "tokens/s", *(["GiB"] if memory else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    if report["lectures"]:
        table.add_column("lecture", justify="right", style="dim", no_wrap=True)
    table.add_column("", style="dim")
    for rung in report["rungs"]:
        lecture = [figure_of(rung["lecture_ms"])] if report["lectures"] else []
        cells = [rung["name"], *rung_cells(rung, memory), *lecture, rung_note(rung, report["tokens"])]
        table.add_row(*map(Text, cells))
    if report["lectures"]:
        table.caption, table.caption_justify = LECTURE_NOTE, "left"
    return table


def rung_cells(rung: dict[str, Any], memory: bool) -> list[str]:
    """The measured cells of one rung, empty where it was skipped."""
    if "ms" not in rung:
        return [""] * (6 if memory else 5)
    cells = [
        figure_of(rung["ms"]),
        f"{figure_of(rung['p10'])}–{figure_of(rung['p90'])}",
        f"{rung['factor']:.2f}",
        f"{rung['total']:.2f}",
        f"{rung['tokens_per_s']:,.0f}",
    ]
    return cells + ([f"{rung['peak_memory_gib']:.1f}"] if memory else [])


def rung_note(rung: dict[str, Any], tokens: int) -> str:
    """What one must know to read a rung's figures."""
    if "skipped" in rung:
        return rung["skipped"]
    notes = []
    if rung["rows"] != rung["rows_wanted"]:
        notes.append(f"out of memory with {counted(rung['rows_wanted'], 'row')} at once, so {rung['rows']}")
    if rung["batch_tokens"] != tokens:
        notes.append(f"steps of {rung['batch_tokens']:,} tokens, {rung['rows']} rows at once; ms of {tokens:,} of them")
    return "; ".join(notes)


def figure_of(value: float | None) -> str:
    """Three digits of a number below a hundred, all before the point above; nothing for None."""
    if value is None:
        return ""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}"


def data_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench data`."""
    mask = ", masked by document" if report["document_mask"] else ""
    first = report["first_step"]
    timed = f"{report['steps']} of {report['batch_tokens']:,} tokens were timed"
    rows = [
        ("tokens/s", f"{report['tokens_per_s']:,.0f}"),
        ("a second of the processor", f"{report['tokens_per_cpu_s']:,.0f} tokens"),
        ("steps/s", f"{figure_of(report['steps_per_s'])} ({timed})"),
        ("first step after", f"{first['seconds']:.2f} s ({first['cpu_s']:.2f} s of the processor)"),
        ("rows", f"{report['seq_len']:,} tokens, {report['micro_batch_rows']} at once, {report['order']}{mask}"),
    ]
    if report["left_out"] is not None:
        rows.append(("left out", f"{report['left_out']:.1%} of the tokens"))
    return pairs(f"batches from {report['folder']}, one process", rows)


def sample_table(report: dict[str, Any]) -> Table:
    """The report of `regpt bench sample`."""
    what = f"{report['source']} ({report['parameters']:,} parameters) on {report['device']}, {report['precision']}"
    lengths = f"prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new ones"
    table = Table(title=Text(f"{what}; {lengths}"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("texts at once", "tokens/s", "ms a token", "first token, ms", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["batches"]:
        each = row["seconds"] / report["new_tokens"] * 1e3
        first = figure_of(row["first_token_s"] * 1e3)
        cells = (str(row["batch"]), f"{row['tokens_per_s']:,.0f}", figure_of(each), first, f"{row['spread']:.1%}")
        table.add_row(*map(Text, cells))
    return table


# ---- the ladder as a picture -----------------------------------------------------------------------------------------

# Okabe & Ito's blue (2008), told apart by colour-blind readers, and greys that differ from it in lightness too.
HERE, LECTURE, TEXT, FAINT = "#0072B2", "#BBBBBB", "#222222", "#666666"
LECTURE_SOURCE = 'grey: on one A100, in the lecture "Let\'s reproduce GPT-2 (124M)" (Karpathy 2024)'


def draw_ladder(report: Mapping[str, Any], path: Path) -> None:
    """Write the report of `regpt bench ladder` as bars, .png or .svg: milliseconds for the same tokens, rung by rung.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
        UsageError: another ending.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    rungs = report["rungs"]
    figure = Figure(figsize=(9.5, 1.7 + 0.55 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    compared = report["lectures"]
    for place, rung in enumerate(rungs):
        draw_rung(axes, place, rung, rung["lecture_ms"] if compared else None)
    axes.set_xlim(0, right_edge(rungs, compared))
    axes.set_ylim(len(rungs) - 0.5, -0.5)  # the first rung on top
    axes.set_yticks(range(len(rungs)), [rung["name"] for rung in rungs], fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    source = f"\n{LECTURE_SOURCE}" if compared else ""
    axes.set_xlabel(
        f"milliseconds for {report['tokens']:,} tokens: forward, backward and update{source}", color=FAINT, loc="left"
    )
    axes.set_title(
        f"{report['model_name']} on {report['device']}: time for the same work, and times as fast as the first",
        loc="left",
        fontsize=11,
        color=TEXT,
    )
    save_figure(figure, path)


def right_edge(rungs: Sequence[Mapping[str, Any]], compared: bool) -> float:
    """Milliseconds at the right edge, so that the longest bar of each kind leaves its figures room."""
    here = max((rung["ms"] for rung in rungs if "ms" in rung), default=1.0)
    lecture = max((rung["lecture_ms"] or 0 for rung in rungs if compared), default=0)
    crowded = any(rung.get("rows") != rung.get("rows_wanted") for rung in rungs)
    return max(here / (0.5 if crowded else 0.66), lecture / 0.94)


def draw_rung(axes: "Axes", place: int, rung: Mapping[str, Any], lecture_ms: float | None) -> None:
    """The bar of one rung with its figures after it, the lecture's below it."""
    top = place - 0.12 if lecture_ms else place
    if "ms" in rung:
        axes.barh(top, rung["ms"], height=0.46, color=HERE)
        figures = f"{figure_of(rung['ms'])} ms   {figure_of(rung['total'])}×   {rung['tokens_per_s']:,.0f} tokens/s"
        if rung.get("rows") != rung.get("rows_wanted"):
            figures += f"   {rung['rows']} rows at once"  # the rest did not fit into memory
        write(axes, (rung["ms"], top), figures, 10, TEXT)
    else:
        write(axes, (0, top), rung["skipped"].split(":")[0], 10, FAINT)
    if lecture_ms:
        axes.barh(place + 0.24, lecture_ms, height=0.2, color=LECTURE)
        write(axes, (lecture_ms, place + 0.24), f"{lecture_ms:,.0f}", 8, FAINT)


def write(axes: "Axes", end: tuple[float, float], words: str, size: int, color: str) -> None:
    """`words` after the end of a bar."""
    axes.annotate(words, end, (6, 0), textcoords="offset points", va="center", fontsize=size, color=color)
