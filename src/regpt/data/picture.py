"""A picture of how long documents are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regpt.console.text import counted
from regpt.data.info import SplitInfo
from regpt.errors import UsageError, UserError
from regpt.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
OTHER_OUT = "choose another place for --out"
STEPS = 4  # bars for each doubling of the length
DOCUMENTS, TOKENS, MARK = "#4c78a8", "#e45756", "#555555"


def check_picture(path: Path) -> None:
    """Raise what `save_figure` would for the name of the file, and for a missing package, before any work."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {str(path)!r} has no known kind of picture; end it in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("a picture needs matplotlib; install it with: pip install 'regpt[report]'") from None


def save_figure(figure: "Figure", path: Path) -> None:
    """Replace the picture `path` (.png or .svg) atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path, OTHER_OUT) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def draw_lengths(splits: Sequence[SplitInfo], path: Path, seq_len: int) -> None:
    """Write the lengths of the documents of each split, counted by documents and by tokens, as .png or .svg.

    Raises:
        UsageError: another ending.
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(splits)), layout="constrained")
    for axes, split in zip(figure.subplots(len(splits), squeeze=False)[:, 0], splits):
        draw_split(axes, split, seq_len)
    save_figure(figure, path)


def draw_split(axes: "Axes", split: SplitInfo, seq_len: int) -> None:
    """Filled: the share of documents of each length; a line: of the tokens, which sit in longer documents."""
    lengths = split.lengths
    edges = bin_edges(int(lengths.min()), int(lengths.max()))
    documents = np.histogram(lengths, edges)[0] / len(lengths) * 100
    tokens = np.histogram(lengths, edges, weights=lengths)[0] / lengths.sum() * 100
    axes.stairs(documents, edges, fill=True, color=DOCUMENTS, alpha=0.55, label="documents")
    axes.stairs(tokens, edges, color=TOKENS, linewidth=1.8, label="tokens")
    axes.axvline(float(np.median(lengths)), color=DOCUMENTS, linestyle="--", label=f"median {np.median(lengths):,.0f}")
    axes.axvline(seq_len, color=MARK, linestyle=":", label=f"a row of {seq_len:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{split.split}: {counted(split.documents, 'document')}, {counted(split.tokens, 'token')}",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel("document length in tokens")
    axes.set_ylabel("% in each bar")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def bin_edges(shortest: int, longest: int) -> np.ndarray:
    """Rising whole numbers, `STEPS` to a doubling, from the shortest length to beyond the longest."""
    first, last = np.floor(STEPS * np.log2(shortest)), np.ceil(STEPS * np.log2(longest + 1))
    return np.unique(np.ceil(2 ** (np.arange(first, last + 1) / STEPS)))
