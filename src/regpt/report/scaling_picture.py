"""A fitted scaling law over its points: loss against parameters, tokens and FLOPs."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regpt.console.text import si
from regpt.errors import UserError
from regpt.files import write_errors
from regpt.report.picture import OTHER_OUT, save_figure
from regpt.report.scaling import ScalingFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Plan = tuple[float, float]  # parameters and tokens
LINE, PLAN = "#444444", "#c8480a"
MAX_LINES = 8


def draw_scaling(found: ScalingFit, path: Path, unit: str, plan: Plan | None = None) -> None:
    """Write the picture to `path` (.png or .svg): points, the law through them, the planned run as a star.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    with write_errors(path, OTHER_OUT):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    places = (*plan, 6 * plan[0] * plan[1]) if plan else (None, None, None)
    draw_lines(left, found, "parameters", "tokens", places[0])
    draw_lines(middle, found, "tokens", "parameters", places[1])
    draw_compute(right, found, places[2])
    value, interval = found.predict(*plan) if plan else (0.0, None)
    for axes, name, x in zip((left, middle, right), ("parameters", "tokens", "FLOPs"), places):
        if x is not None:
            axes.plot([x, x], interval or (value, value), color=PLAN, linewidth=1.5)
            axes.plot([x], [value], "*", color=PLAN, markersize=12, label=f"planned: {value:.3f}")
        axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(color="#edf0f3")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5)
    left.set_ylabel(f"validation loss, {unit}")
    law = found.law
    title = f"L = {law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    save_figure(figure, path)


def draw_lines(axes: "Axes", found: ScalingFit, along: str, other: str, plan: float | None) -> None:
    """Loss against `along`, a line for each value of `other` that points have."""
    from matplotlib import colormaps

    values = sorted({getattr(point, other) for point in found.points})
    shown = {values[int(i)] for i in np.linspace(0, len(values) - 1, min(len(values), MAX_LINES))}
    grid = grid_over([getattr(point, along) for point in found.points], plan)
    for i, value in enumerate(values):
        colour = colormaps["viridis"](0.9 * i / max(1, len(values) - 1))
        points = [(getattr(point, along), point.loss) for point in found.points if getattr(point, other) == value]
        label = f"{si(value)} {other}" if value in shown else None
        axes.plot(*zip(*points), "o", color=colour, markersize=5, label=label)
        if value in shown:
            losses = [found.law.loss(**{along: place, other: value}) for place in grid]
            axes.plot(grid, losses, color=colour, linewidth=1.2)


def draw_compute(axes: "Axes", found: ScalingFit, plan: float | None) -> None:
    """Loss against FLOPs, with the lowest loss that the law allows for each number of FLOPs (6·N·D)."""
    flops = [point.flops for point in found.points]
    axes.plot(flops, [point.loss for point in found.points], "o", color="#2563d9", markersize=5, label="runs")
    grid = grid_over(flops, plan)
    with suppress(UserError):  # no optimum: the warnings give the reason
        best = [found.law.loss(*found.law.optimum(flops)) for flops in grid]
        axes.plot(grid, best, color=LINE, linewidth=1.2, linestyle="--", label="best for the FLOPs, by the law")


def grid_over(places: list[float], plan: float | None) -> np.ndarray:
    """100 places, evenly spaced on a logarithmic axis, over all of `places` and the plan."""
    reach = [*places, *([plan] if plan else [])]
    return np.geomspace(min(reach) / 1.3, max(reach) * 1.3, 100)
