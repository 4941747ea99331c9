"""A report of `regpt bench ladder` as a picture: milliseconds for the same tokens, rung by rung.

regpt bench ladder --json ladder.json
python benchmarks/ladder.py ladder.json ladder.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

# Okabe & Ito's blue (2008), told apart by colour-blind readers, and greys that differ from it in lightness too.
HERE, LECTURE, TEXT, FAINT = "#0072B2", "#BBBBBB", "#222222", "#666666"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path, help=".png or .svg")
    given = parser.parse_args()
    report = json.loads(given.report.read_text(encoding="utf-8"))
    rungs, compared = report["rungs"], report["lectures"]
    figure = Figure(figsize=(9.5, 1.7 + 0.55 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for place, rung in enumerate(rungs):
        lecture = rung["lecture_ms"] if compared else None
        top, ms, note = (place - 0.12 if lecture else place), rung.get("ms", 0), rung.get("skipped", "").split(":")[0]
        figures = f"{ms:,.4g} ms   {rung['total']:.2f}×   {rung['tokens_per_s']:,.0f} tokens/s" if ms else note
        if rung.get("rows") != rung.get("rows_wanted"):
            figures += f"   {rung['rows']} rows at once"  # the rest did not fit into memory
        axes.barh(top, ms, height=0.46, color=HERE)
        write(axes, ms, top, figures, 10, TEXT if ms else FAINT)
        if lecture:
            axes.barh(place + 0.24, lecture, height=0.2, color=LECTURE)
            write(axes, lecture, place + 0.24, f"{lecture:,.0f}", 8, FAINT)
    longest = max((rung["lecture_ms"] or 0 for rung in rungs), default=0) if compared else 0
    axes.set_xlim(0, max(longest / 0.94, max(rung.get("ms", 1.0) for rung in rungs) / 0.5))  # room for the figures
    axes.set_ylim(len(rungs) - 0.5, -0.5)  # the first rung on top
    axes.set_yticks(range(len(rungs)), [rung["name"] for rung in rungs], fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    source = '\ngrey: on one A100, in the lecture "Let\'s reproduce GPT-2 (124M)" (Karpathy 2024)' if compared else ""
    work = f"milliseconds for {report['tokens']:,} tokens: forward, backward and update{source}"
    axes.set_xlabel(work, color=FAINT, loc="left")
    title = f"{report['model_name']} on {report['device']}: time for the same work, and times as fast as the first"
    axes.set_title(title, loc="left", fontsize=11, color=TEXT)
    figure.savefig(given.picture, dpi=150)


def write(axes, x: float, y: float, words: str, size: int, color: str) -> None:
    """`words` after the end of a bar."""
    axes.annotate(words, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=size, color=color)


if __name__ == "__main__":
    main()
