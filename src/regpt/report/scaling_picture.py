"""A fitted scaling law over its points: loss against parameters, tokens and FLOPs."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regpt.data.picture import OTHER_OUT, save_figure
from regpt.errors import UserError
from regpt.files import write_errors
from regpt.report.scaling import ScalingFit
from regpt.report.summary import si

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
    draw_lines(left, found, ("parameters", "tokens"), plan)
    draw_lines(middle, found, ("tokens", "parameters"), plan)
    draw_compute(right, found, plan)
    left.set_ylabel(f"validation loss, {unit}")
    law = found.law
    figure.suptitle(
        f"L = {law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    save_figure(figure, path)


def draw_lines(axes: "Axes", found: ScalingFit, keys: tuple[str, str], plan: Plan | None) -> None:
    """Loss against the first of `keys`, a line for each value of the second that points have."""
    from matplotlib import colormaps

    along, other = keys
    x = np.array([getattr(point, along) for point in found.points])
    values = sorted({getattr(point, other) for point in found.points})
    shown = (
        values
        if len(values) <= MAX_LINES
        else [values[i] for i in np.linspace(0, len(values) - 1, MAX_LINES).astype(int)]
    )
    reach = [*x, *([plan[along == "tokens"]] if plan else [])]
    grid = np.geomspace(min(reach) / 1.3, max(reach) * 1.3, 100)
    for value in values:
        share = values.index(value) / max(1, len(values) - 1)
        colour = colormaps["viridis"](0.9 * share)
        points = [point for point in found.points if getattr(point, other) == value]
        label = f"{si(value)} {other}" if value in shown else None
        axes.plot(
            [getattr(p, along) for p in points], [p.loss for p in points], "o", color=colour, markersize=5, label=label
        )
        if value in shown:
            axes.plot(grid, [predict(found, along, place, value) for place in grid], color=colour, linewidth=1.2)
    mark_plan(axes, found, plan, None if plan is None else plan[along == "tokens"])
    finish(axes, along)


def predict(found: ScalingFit, along: str, place: float, other: float) -> float:
    return found.law.loss(place, other) if along == "parameters" else found.law.loss(other, place)


def draw_compute(axes: "Axes", found: ScalingFit, plan: Plan | None) -> None:
    """Loss against FLOPs, with the lowest loss that the law allows for each number of FLOPs (6·N·D)."""
    axes.plot(
        [p.flops for p in found.points],
        [p.loss for p in found.points],
        "o",
        color="#2563d9",
        markersize=5,
        label="runs",
    )
    at = 6 * plan[0] * plan[1] if plan else None
    reach = [*(p.flops for p in found.points), *([at] if at else [])]
    grid = np.geomspace(min(reach) / 1.3, max(reach) * 1.3, 100)
    try:
        best = [found.law.loss(*found.law.optimum(flops)) for flops in grid]
        axes.plot(grid, best, color=LINE, linewidth=1.2, linestyle="--", label="best for the FLOPs, by the law")
    except UserError:  # no optimum: the warnings say why
        pass
    mark_plan(axes, found, plan, at)
    finish(axes, "FLOPs")


def mark_plan(axes: "Axes", found: ScalingFit, plan: Plan | None, x: float | None) -> None:
    if plan is None or x is None:
        return
    value, interval = found.predict(*plan)
    if interval is not None:
        axes.plot([x, x], interval, color=PLAN, linewidth=1.5)
    axes.plot([x], [value], "*", color=PLAN, markersize=12, label=f"planned: {value:.3f}")


def finish(axes: "Axes", name: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(name)
    axes.grid(color="#edf0f3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7.5)
