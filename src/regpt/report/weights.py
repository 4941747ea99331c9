"""A model's weights: a table of its parameters, the tokens nearest to a token, pictures like the lecture's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regpt.errors import UserError, nearest
from regpt.report.picture import save_figure
from regpt.text.tokenizer import Tokenizer, quoted, with_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = re.compile(r"^(\w+)\.(\d+)\.(.+)$")
CORNER = 300  # rows and columns of a matrix that are drawn (the lecture)
COLOURS = ("#2563d9", "#c8480a", "#0b7f56")
LECTURE_CHANNELS = (150, 200, 250)


@dataclass(frozen=True)
class Tensors:
    """A parameter, or the `count` parameters of one name and `shape` in consecutive blocks (`h.0-11.mlp.weight`).

    `parameters` are all their values; `mean`, `std`, `least` and `greatest` are over them.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    mean: float
    std: float
    least: float
    greatest: float
    parameters: int


def parameter_table(tensors: Mapping[str, Tensor], *, every: bool = False) -> list[Tensors]:
    """The parameters in the model's order, those of equal name and shape in all blocks in one row unless `every`."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in tensors.items():
        key = name if every else BLOCK.sub(r"\1.*.\3", name)
        groups.setdefault((key, tuple(tensor.shape)), []).append(name)
    return [describe_tensors(key, names, tensors) for (key, _), names in groups.items()]


def describe_tensors(key: str, names: list[str], tensors: Mapping[str, Tensor]) -> Tensors:
    values = [tensors[name].double() for name in names]
    n = sum(x.numel() for x in values)
    mean = sum(x.sum().item() for x in values) / n
    variance = sum((x - mean).square().sum().item() for x in values) / n
    blocks = [int(block[2]) for name in names if (block := BLOCK.match(name))]
    span = f"{min(blocks)}-{max(blocks)}" if len(blocks) > 1 else "".join(map(str, blocks))
    least, greatest = min(x.min().item() for x in values), max(x.max().item() for x in values)
    shape = tuple(values[0].shape)
    return Tensors(key.replace("*", span), shape, len(names), mean, variance**0.5, least, greatest, n)


def find_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The matrix called `name`.

    Raises:
        UserError: no parameter has this name, or it does not have two dimensions.
    """
    matrices = [other for other, tensor in tensors.items() if tensor.dim() == 2]
    if name not in matrices:
        what = "is no matrix" if name in tensors else "is unknown"
        some = ", ".join(matrices[:6]) + (", …" if len(matrices) > 6 else "")
        raise UserError(f"parameter {name!r} {what}{nearest(name, matrices)}; choose a matrix: {some}")
    return tensors[name]


# ---- tokens


@dataclass(frozen=True)
class Neighbour:
    """A token near another: `cosine` of the angle between their embeddings, `norm` of its own."""

    id: int
    text: str
    cosine: float
    norm: float


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """Id of the one token that `text` encodes to.

    Raises:
        UserError: it encodes to several tokens, or is empty.
    """
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise UserError("the text given as token is empty; give the text of one token, such as ' the'")
    parts = ", ".join(quoted(tokenizer.token_bytes(i)) for i in ids[:8])
    raise UserError(f"{text!r} is {len(ids)} tokens, not one: {parts}; give one of them (a space at the front counts)")


@torch.no_grad()
def nearest_tokens(embedding: Tensor, tokenizer: Tokenizer, token: int, n: int) -> list[Neighbour]:
    """The `n` tokens whose rows of `embedding` (V, C) make the smallest angle with that of `token`, itself left out."""
    rows = embedding.float()
    norms = rows.norm(dim=1)  # (V,)
    cosines = (rows @ rows[token]) / (norms * norms[token]).clamp(min=1e-12)
    cosines[token] = -2.0  # below every cosine
    found = torch.topk(cosines, min(n, len(rows) - 1)).indices.tolist()
    return [Neighbour(i, with_bytes(tokenizer.token_bytes(i)), cosines[i].item(), norms[i].item()) for i in found]


# ---- pictures


def draw_weights(path: Path, positions: Tensor | None, matrix: tuple[str, Tensor]) -> None:
    """Write the pictures to `path` (.png or .svg).

    `positions` (T, C) is None for a model without learned positions. Some of its channels are drawn as curves: the
    lecture's where the model is large enough for them.
    """
    from matplotlib.figure import Figure

    panels = 3 if positions is not None else 1
    figure = Figure(figsize=(4.8 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if positions is not None:
        values, width = positions.float().cpu().numpy(), positions.size(1)
        image(figure, axes[0], values, "position embeddings", "channel", "position")
        large = width > max(LECTURE_CHANNELS)
        for channel, colour in zip(LECTURE_CHANNELS if large else (width // 5, width // 4, width // 3), COLOURS):
            axes[1].plot(values[:, channel], color=colour, linewidth=0.9, label=f"channel {channel}")
        axes[1].set_title("channels of the position embeddings", fontsize=9, loc="left")
        axes[1].set_xlabel("position")
        axes[1].spines[["top", "right"]].set_visible(False)
        axes[1].legend(frameon=False, fontsize=8)
    name, weight = matrix
    corner = weight[:CORNER, :CORNER].float().cpu().numpy()
    rows, columns = corner.shape
    part = f", the first {rows} × {columns} of {weight.size(0)} × {weight.size(1)}"
    title = name if tuple(weight.shape) == corner.shape else name + part
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
