"""The ladder as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regpt.data.picture import check_picture, save_figure
from regpt.tools.bench.tables import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """The bar of one rung with its figures behind it, the lecture's below it."""
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
    """`words` behind the end of a bar."""
    axes.annotate(words, end, (6, 0), textcoords="offset points", va="center", fontsize=size, color=color)
