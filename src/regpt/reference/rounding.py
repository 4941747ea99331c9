"""How numbers are kept in few bits: float formats, int8, NF4, ternary, in NumPy. Each function returns what is read
back.

The tests compare with torch's casts and with the model's own formats (`regpt.model.quantize`).
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from regpt.reference.gpt2 import Array


class FloatFormat(NamedTuple):
    """A sign, `exponent` bits, `mantissa` bits; value = ±1.mantissa · 2^(exponent - bias).

    Attributes:
        largest: the largest finite number.
        infinite: whether there is an infinity; without one, larger numbers are NaN.
    """

    exponent: int
    mantissa: int
    largest: float
    infinite: bool = True

    @property
    def smallest_exponent(self) -> int:
        """Of normal numbers; below, the spacing stays as it is there (subnormal numbers) down to 0."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number; rounding changes a number by half of it at most, relatively."""
        return 2.0**-self.mantissa


FLOATS = {
    "fp32": FloatFormat(8, 23, (2 - 2.0**-23) * 2.0**127),
    "tf32": FloatFormat(8, 10, (2 - 2.0**-10) * 2.0**127),  # what tensor cores read of an fp32 number
    "fp16": FloatFormat(5, 10, 65504.0),
    "bf16": FloatFormat(8, 7, (2 - 2.0**-7) * 2.0**127),  # fp32's range: no loss scaling
    "fp8_e4m3": FloatFormat(4, 3, 448.0, infinite=False),  # Micikevicius et al. 2022, table 1
    "fp8_e5m2": FloatFormat(5, 2, 57344.0),
}


def to_float(x: Array, name: str) -> Array:
    """x (float64) rounded to the nearest number of the format, to the even one of two.

    The spacing of a number in [2^e, 2^(e+1)) is 2^(e - mantissa): divide by it, round to an integer, multiply.
    """
    form = FLOATS[name]
    exponent = np.frexp(x)[1] - 1  # frexp has its fraction in [1/2, 1)
    spacing = np.exp2(np.maximum(exponent, form.smallest_exponent) - form.mantissa)
    y = np.round(x / spacing) * spacing  # np.round is to even
    beyond = np.abs(y) > form.largest
    return np.where(beyond & np.isfinite(x), np.copysign(np.inf if form.infinite else np.nan, x), y)


def int8_rows(w: Array) -> Array:
    """Each row as integers from -127 to 127 times a scale, its largest number at 127 ("absmax"; Dettmers et al. 2022).
    One large number in a row makes its scale coarse for all others, why rows and not whole matrices share one."""
    scale = np.abs(w).max(1, keepdims=True) / 127
    return np.round(w / np.where(scale == 0, 1, scale)) * scale


def nf4_levels() -> Array:
    """The 16 numbers of NF4 (Dettmers et al. 2023, appendix E): quantiles of N(0, 1), so that each is used about as
    often for weights that are normal; 8 for the positive side, 7 for the negative, 0 itself, divided by the largest.

    The outermost quantile would be infinite: it is that of (1/32 + 1/30)/2 = 0.0323 from the end.
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    inverse = NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = np.array(sorted([*negative, 0.0, *positive]))
    return levels / levels.max()


def nf4(w: Array, block: int = 64) -> Array:
    """w (n,), n a multiple of `block`: each block divided by its largest magnitude, then to the nearest level: 4 bits,
    and 32 / 64 = 0.5 more for the scale (double quantisation stores the scales in 8 bits: 0.127)."""
    blocks, levels = w.reshape(-1, block), nf4_levels()
    scale = np.abs(blocks).max(1, keepdims=True)
    share = blocks / np.where(scale == 0, 1, scale)
    nearest = np.abs(share[..., None] - levels).argmin(-1)
    return (levels[nearest] * scale).reshape(-1)


def ternary(w: Array) -> Array:
    """scale·{-1, 0, 1} with scale = mean |w| (BitNet b1.58, Ma et al. 2024, eq. 1 to 3): log2 3 = 1.58 bits each."""
    scale = np.abs(w).mean()
    return np.clip(np.round(w / (scale if scale else 1)), -1, 1) * scale


def bits_a_weight(levels: int, block: int, scale_bits: float) -> float:
    """log2(levels), and the scale's share."""
    return math.log2(levels) + scale_bits / block
