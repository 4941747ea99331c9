"""Pictures of weights, as the lecture draws them: position embeddings, some of their channels, a corner of a matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from regpt.report.scaling_picture import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CORNER = 300  # rows and columns of a matrix that are drawn (the lecture)
COLOURS = ("#2563d9", "#c8480a", "#0b7f56", "#9333b8", "#a07100", "#c21f5b", "#0a7f9c", "#5d6672")


def draw_weights(path: Path, positions: Tensor | None, channels: Sequence[int], matrix: tuple[str, Tensor]) -> None:
    """Write the pictures to `path` (.png or .svg).

    `positions` (T, C) are left out where a model has none that it learned; `channels` are columns of them.
    """
    from matplotlib.figure import Figure

    panels = 3 if positions is not None else 1
    figure = Figure(figsize=(4.8 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if positions is not None:
        values = positions.float().cpu().numpy()
        image(figure, axes[0], values, "position embeddings", "channel", "position")
        draw_channels(axes[1], values, channels)
    name, weight = matrix
    corner = weight[:CORNER, :CORNER].float().cpu().numpy()
    rows, columns = corner.shape
    whole = tuple(weight.shape) == corner.shape
    title = name if whole else f"{name}, the first {rows} × {columns} of {weight.size(0)} × {weight.size(1)}"
    image(figure, axes[-1], corner, title, "in", "out")
    save_figure(figure, path)


def image(figure: "Figure", axes: "Axes", values: np.ndarray, title: str, x: str, y: str) -> None:
    """A matrix in grey: zero is middle grey, the largest 1 % of the values are black and white."""
    reach = float(np.quantile(np.abs(values), 0.99)) or 1.0
    shown = axes.imshow(values, cmap="gray", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def draw_channels(axes: "Axes", positions: np.ndarray, channels: Sequence[int]) -> None:
    for i, channel in enumerate(channels):
        axes.plot(positions[:, channel], color=COLOURS[i % len(COLOURS)], linewidth=0.9, label=f"channel {channel}")
    axes.set_title("channels of the position embeddings", fontsize=9, loc="left")
    axes.set_xlabel("position")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
