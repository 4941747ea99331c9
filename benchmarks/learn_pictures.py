"""The pictures of `regpt explain`: `python benchmarks/learn_pictures.py [TOPIC …]` writes src/regpt/learn/TOPIC.svg.

Legible on light and dark pages: no background; text and axes in a grey with a contrast of 4 or more on white and on
black.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

from regpt.reference.bpe import encode, train
from regpt.reference.char_model import char_backward, char_forward, char_parameters
from regpt.reference.flash import bytes_moved
from regpt.reference.gpt2 import softmax
from regpt.reference.layers import masked_attention, naive_softmax, visible_positions
from regpt.reference.optimizers import RULES, accumulated, accumulated_wrongly
from regpt.reference.rounding import FLOATS

FOLDER = Path(__file__).parents[1] / "src/regpt/learn"
GREY = "#7f7f7f"
COLORS = ["#3b8fd4", "#e0662b", "#3a9d5d", "#b06fc4", "#c9971c", "#d1495b"]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regpt",  # the same file every time
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def softmax_picture() -> None:
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    scores, at = np.array([3.0, 2.0, 1.5, 0.0, -1.0]), np.arange(5)
    for i, temperature in enumerate((0.5, 1.0, 2.0)):
        left.bar(at + (i - 1) * 0.27, softmax(scores / temperature), 0.25, label=f"temperature {temperature:g}")
    left.set(xlabel="score of the token", ylabel="probability", xticks=at, xticklabels=[f"{s:g}" for s in scores])
    left.legend()
    x = np.linspace(0, 120, 241, dtype=np.float32)
    pairs = np.stack([x, x - 1], 1)
    right.plot(x, softmax(pairs)[:, 0], label="maximum subtracted", linewidth=5, alpha=0.4)
    right.plot(x, naive_softmax(pairs)[:, 0], label="as the formula stands")
    right.axvline(88.72, color=GREY, linestyle=":", linewidth=1)
    right.text(89.5, 0.2, "exp(88.7) is the largest\nfloat32", color=GREY)
    right.set(xlabel="larger of two scores that are 1 apart", ylabel="its probability, float32", ylim=(0, 1))
    right.legend(loc="lower left")


def attention_picture() -> None:
    words = ["the", "cat", "sat", "on", "the", "mat"]
    q, k, v = np.random.default_rng(3).normal(size=(3, 1, 1, 6, 64))
    _, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for axis, scale, title in zip(axes, (1, 8), ("scores divided by √64", "scores as they are")):
        p = masked_attention(q * scale, k, v, visible_positions(6))[1][3][0, 0]
        shown = axis.imshow(np.where(np.tri(6) == 1, p, np.nan), vmin=0, vmax=1, cmap="viridis")
        axis.set(title=title, xticks=range(6), yticks=range(6), xticklabels=words, yticklabels=words)
        axis.set(xlabel="reads the value of", ylabel="query of")
        axis.spines[:].set_visible(False)
        plt.colorbar(shown, ax=axis, label="weight", shrink=0.85)


def dropout_picture() -> None:
    rng = np.random.default_rng(0)
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for rate in (0.1, 0.3, 0.6):
        sums = (rng.random((20_000, 100)) >= rate).sum(1) / (1 - rate)
        left.hist(
            sums, bins=np.arange(30, 170, 100 / (100 * (1 - rate))), density=True, alpha=0.6, label=f"rate {rate:g}"
        )
    left.axvline(100, color=GREY, linestyle=":", linewidth=1)
    left.set(xlabel="sum of 100 ones after dropout", ylabel="share of 20,000 masks per 1")
    left.legend()
    p = softmax(np.array([2.0, 1.0, 0.5, 0.0, 1.5, 0.2]))
    kept = np.array([1, 0, 1, 1, 0, 1]) / 0.7
    right.bar(np.arange(6) - 0.2, p, 0.38, label=f"weights, sum {p.sum():.2f}")
    right.bar(np.arange(6) + 0.2, p * kept, 0.38, label=f"one mask at rate 0.3, sum {(p * kept).sum():.2f}")
    right.set(xlabel="position", ylabel="weight of one query", ylim=(0, 0.85))
    right.legend()


def optimizers_picture() -> None:
    curvature = np.array([1.0, 20.0])
    _, axis = plt.subplots(figsize=(8, 3.4))
    x, y = np.meshgrid(np.linspace(-0.8, 5.4, 200), np.linspace(-1.2, 1.2, 200))
    axis.contour(
        x, y, (curvature[0] * x**2 + curvature[1] * y**2) / 2, levels=12, colors=GREY, linewidths=0.5, alpha=0.6
    )
    for name, lr in (("sgd", 0.09), ("momentum", 0.02), ("rmsprop", 0.1), ("adam", 0.2)):
        p, state, path = np.array([5.0, 1.0]), {}, [np.array([5.0, 1.0])]
        for step in range(1, 41):
            p, state = RULES[name](p, curvature * p, state, step, lr)
            path.append(p)
        axis.plot(*np.array(path).T, marker=".", markersize=5, linewidth=1.2, label=f"{name}, rate {lr:g}")
    axis.set(xlabel="weight along the valley (curvature 1)", ylabel="weight across (curvature 20)")
    axis.legend(title="40 steps from the right", loc="lower center", ncols=4)
    axis.set_ylim(-1.7, 1.2)


def accumulation_picture() -> None:
    counts = [90, 60, 30, 10]
    _, axis = plt.subplots(figsize=(8, 3))
    rules = (("Σ losses / Σ targets", accumulated), ("mean of means", accumulated_wrongly))
    for shift, (label, rule) in zip((-0.2, 0.2), rules):
        weights = [rule([float(i == j) for j in range(4)], counts) for i in range(4)]
        axis.bar(np.arange(4) + shift, weights, 0.38, label=label)
    axis.set(xlabel="targets of the micro-batch", xticks=range(4), xticklabels=counts)
    axis.set(ylabel="weight of one target\nin the step's gradient")
    axis.legend()


def formats_picture() -> None:
    _, axis = plt.subplots(figsize=(8, 3.8))
    for name, form in FLOATS.items():
        low, high = form.smallest_exponent - form.mantissa, int(np.log2(form.largest))
        exponent = np.arange(max(low, -60), min(high, 60) + 1)
        spacing = np.maximum(exponent, form.smallest_exponent) - form.mantissa
        axis.plot(
            exponent, np.exp2(spacing - exponent), label=name, linewidth=2, marker="|" if len(exponent) < 40 else ""
        )
    power_ticks(axis, range(-24, 1, 4), base=2)
    axis.set(
        xlabel="magnitude of the number, as a power of 2", ylabel="distance to the next number,\nshare of the number"
    )
    axis.legend(ncols=3, loc="center right", bbox_to_anchor=(1, 0.3))


def backpropagation_picture() -> None:
    rng = np.random.default_rng(0)
    p = char_parameters(rng)
    d = char_backward(p, char_forward(p, rng.integers(27, size=(32, 3)), rng.integers(27, size=32)))[1]
    names = [name for name in d if name not in ("top", "mean")]  # 0 but for rounding
    _, axis = plt.subplots(figsize=(8, 3.2))
    axis.bar(range(len(names)), [np.abs(d[name]).max() for name in names])
    power_ticks(axis, range(-4, 2))
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axis.set(xlabel="value, from the loss backward", ylabel="largest |∂ loss / ∂ value|")


def tokenization_picture() -> None:
    page = (FOLDER / "attention.md").read_text(encoding="utf-8")
    english = " ".join(word for word in page.split("## Try it")[0].split() if word.isascii())
    texts = {
        "English, another page": (FOLDER / "softmax.md").read_text(encoding="utf-8").split("## Try it")[0][:1500],
        "Python": Path(__file__).read_text(encoding="utf-8")[1500:3000],
        "numbers": " ".join(str(n * n) for n in range(30, 130)),
        "Chinese": "模型读取的是数字。字符很简单，但文本会很长。",
    }
    merges = list(train([english], 700).items())
    sizes = [0, 25, 50, 100, 200, 300, len(merges)]
    _, axis = plt.subplots(figsize=(8, 3.2))
    for label, text in texts.items():
        each = [len(text.encode()) / len(encode(text, dict(merges[:size]))) for size in sizes]
        axis.plot(sizes, each, marker="o", label=label)
    axis.set(xlabel="merges learned from a page of English", ylabel="bytes a token", ylim=(0.9, None))
    axis.legend()


def flash_picture() -> None:
    _, axis = plt.subplots(figsize=(8, 3))
    lengths = [2**n for n in range(8, 16)]
    for label in ("usual", "tiles"):
        axis.plot(range(8), [bytes_moved(T, 64, 128)[label] / 2**20 for T in lengths], marker="o", label=label)
    axis.set_yscale("log", base=2)
    powers = range(-2, 14, 3)
    axis.set_yticks([2.0**n for n in powers], [f"{2.0**n:g}" for n in powers])
    axis.set_xticks(range(8), [f"{T:,}" for T in lengths])
    axis.set(xlabel="length T, heads of 64 numbers, 16 bits", ylabel="MiB moved by one head, forward")
    axis.legend()


def residual_picture() -> None:
    rng = np.random.default_rng(0)
    _, axis = plt.subplots(figsize=(8, 3.2))
    for scale, residual, label in (
        (0.7, False, "product, weights 30 % small"),
        (1.3, False, "product, weights 30 % large"),
        (0.7, True, "sum"),
        (0.7 / 50**0.5, True, "sum, branches by 1/√50"),
    ):
        weights = rng.normal(0, scale / 8, size=(50, 64, 64))
        x, kept = rng.normal(size=64), []
        for w in weights:
            kept.append(np.tanh(w @ x))
            x = x + kept[-1] if residual else kept[-1]
        d, norms = rng.normal(size=64), []
        for w, h in zip(weights[::-1], kept[::-1]):
            branch = w.T @ (d * (1 - h**2))
            d = d + branch if residual else branch
            norms.append(np.linalg.norm(d))
        axis.plot(range(1, 51), norms[::-1], label=label)
    power_ticks(axis, range(-9, 4, 3))
    axis.set(xlabel="layer", ylabel="norm of the gradient")
    axis.legend()


def power_ticks(axis: Any, powers: Sequence[int], base: int = 10) -> None:
    """A logarithmic y axis whose labels are text: 10⁻³."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axis.set_yscale("log", base=base)
    axis.set_yticks([float(base) ** n for n in powers], [str(base) + str(n).translate(raised) for n in powers])
    axis.minorticks_off()


def lora_picture() -> None:
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    _, axis = plt.subplots(figsize=(8, 3))
    axis.plot(range(len(ranks)), [16 * r * 2 * 4096 / 2**20 for r in ranks], marker="o", label="A and B of rank r")
    axis.axhline(16 * 4096**2 / 2**20, color=COLORS[1], label="the whole matrix")
    power_ticks(axis, range(-1, 4))
    axis.set_xticks(range(len(ranks)), [str(r) for r in ranks])
    axis.set(xlabel="rank r", ylabel="MiB: weights, gradients, moments\n(float32)")
    axis.legend()


def speculation_picture() -> None:
    p, q = np.array([0.42, 0.28, 0.16, 0.09, 0.05]), np.array([0.2, 0.35, 0.25, 0.05, 0.15])
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    at = np.arange(5)
    left.bar(at - 0.2, p, 0.38, label="p, large model")
    left.bar(at + 0.2, q, 0.38, label="q, draft")
    left.legend()
    right.bar(at, np.minimum(p, q), 0.6, color=COLORS[2], label=f"accepted, {np.minimum(p, q).sum():.2f} in all")
    right.bar(at, p - np.minimum(p, q), 0.6, bottom=np.minimum(p, q), color=COLORS[3], label="drawn after a refusal")
    right.legend()
    for axis in (left, right):
        axis.set(xlabel="token", xticks=at)
    left.set(ylabel="probability")


def data_parallel_picture() -> None:
    ranks = [2, 4, 8, 16, 32, 64, 128]
    _, axis = plt.subplots(figsize=(8, 3))
    axis.plot(range(7), [0.124 * (n - 1) for n in ranks], marker="o", label="one rank collects and sends back")
    axis.plot(range(7), [2 * 0.124 * (n - 1) / n for n in ranks], marker="o", label="ring")
    power_ticks(axis, range(-1, 3))
    axis.set_xticks(range(7), [str(n) for n in ranks])
    axis.set(xlabel="ranks", ylabel="billion numbers sent\nby the busiest rank")
    axis.legend()


PICTURES: dict[str, Callable[[], None]] = {
    "softmax": softmax_picture,
    "attention": attention_picture,
    "dropout": dropout_picture,
    "optimizers": optimizers_picture,
    "gradient-accumulation": accumulation_picture,
    "float-formats": formats_picture,
    "backpropagation": backpropagation_picture,
    "tokenization": tokenization_picture,
    "flash-attention": flash_picture,
    "residual-stream": residual_picture,
    "lora": lora_picture,
    "speculative-sampling": speculation_picture,
    "data-parallel": data_parallel_picture,
}

if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        for topic in sys.argv[1:] or PICTURES:
            PICTURES[topic]()
            plt.savefig(FOLDER / f"{topic}.svg", transparent=True, metadata={"Date": None})
            plt.close("all")
