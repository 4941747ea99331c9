"""A model's weights: a table of its parameters, the tokens nearest to a token, pictures like the lecture's."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regpt.errors import UserError, nearest
from regpt.report.scaling_picture import save_figure
from regpt.text.tokenizer import Tokenizer, quoted, with_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = re.compile(r"^(\w+)\.(\d+)\.(.+)$")
CORNER = 300  # rows and columns of a matrix that are drawn (the lecture)
COLOURS = ("#2563d9", "#c8480a", "#0b7f56", "#9333b8", "#a07100", "#c21f5b", "#0a7f9c", "#5d6672")


@dataclass(frozen=True)
class Tensors:
    """A parameter, or the parameters of one name and shape in consecutive blocks.

    Attributes:
        name: of the parameter; `h.0-11.mlp.weight` for twelve of them.
        shape: of each.
        count: how many.
        mean, std: over all their values.
        least, greatest: value.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    mean: float
    std: float
    least: float
    greatest: float

    @property
    def parameters(self) -> int:
        return self.count * torch.Size(self.shape).numel()


def parameter_table(tensors: Mapping[str, Tensor], *, every: bool = False) -> list[Tensors]:
    """The parameters in the model's order, those of equal name and shape in all blocks in one row unless `every`."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensor in tensors.items():
        block = BLOCK.match(name)
        key = name if every or block is None else f"{block[1]}.*.{block[3]}"
        groups.setdefault((key, tuple(tensor.shape)), []).append(name)
    return [describe_tensors(key, names, tensors) for (key, _), names in groups.items()]


def describe_tensors(key: str, names: list[str], tensors: Mapping[str, Tensor]) -> Tensors:
    values = [tensors[name].double() for name in names]
    n = sum(x.numel() for x in values)
    mean = sum(x.sum().item() for x in values) / n
    variance = sum((x - mean).square().sum().item() for x in values) / n
    return Tensors(
        name=key.replace("*", block_range(names)) if "*" in key else key,
        shape=tuple(values[0].shape),
        count=len(names),
        mean=mean,
        std=variance**0.5,
        least=min(x.min().item() for x in values),
        greatest=max(x.max().item() for x in values),
    )


def block_range(names: Iterable[str]) -> str:
    """`0-11` of the blocks that `names` are in."""
    numbers = [int(block[2]) for name in names if (block := BLOCK.match(name))]
    return f"{min(numbers)}-{max(numbers)}" if len(numbers) > 1 else str(numbers[0])


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


def draw_weights(path: Path, positions: Tensor | None, channels: Sequence[int], matrix: tuple[str, Tensor]) -> None:
    """Write the pictures to `path` (.png or .svg).

    `positions` (T, C) is None for a model without learned positions; `channels` are columns of it.
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
