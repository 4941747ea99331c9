"""`triton_fp8` in plain PyTorch: this module rounds nothing, in float64, and `Rounding` rounds to FP8, in float32.
Both see to it that no number exceeds its bound.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from regpt.kernels.fp8 import TOP, Rounded


def both_ways(N: int, M: int, dtype: torch.dtype, device: torch.device) -> tuple[Rounded, Rounded]:
    scale = torch.ones((), dtype=torch.float32, device=device)
    rows, columns = (torch.empty(shape, dtype=torch.float64, device=device) for shape in ((N, M), (M, N)))
    return Rounded(rows, scale), Rounded(columns, scale)


def round_both_ways(
    x: Tensor,
    dtype: torch.dtype,
    bound: Tensor,
    *,
    form: str = "plain",
    before: Tensor | None = None,
    sums: bool = False,
    out: tuple[Rounded, Rounded] | None = None,
) -> tuple[Rounded, Rounded, Tensor | None]:
    rows, columns = out or both_ways(*x.shape, dtype, x.device)
    x = bounded(x, bound, form, before)
    rows.numbers.copy_(x)
    columns.numbers.copy_(x.T)
    return rows, columns, x.sum(0)[None, None] if sums else None


def bounded(x: Tensor, bound: Tensor, form: str, before: Tensor | None) -> Tensor:
    """What is to be rounded."""
    if form == "gelu":
        x = F.gelu(x, approximate="tanh")
    if form == "dgelu":
        assert before is not None
        x = x * reference.gelu_gradient(before)
    assert x.abs().max().item() <= bound.item() * (1 + 1e-6)  # bounds are float32
    return x


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, bound: Tensor
) -> tuple[Rounded, Rounded, tuple[Tensor, Tensor]]:
    h, statistics = reference.layer_norm(x, weight, bias, eps)
    rows, columns, _ = round_both_ways(h, dtype, bound)
    return rows, columns, statistics


def largest(x: Tensor) -> Tensor:
    return x.abs().max().float()


class Rounding:
    """The same, to FP8: `numbers` are float32 that FP8 can hold, for products that take no FP8.

    Attributes:
        looseness: of each bound: how many times the largest number it was.
    """

    def __init__(self):
        self.looseness: list[float] = []

    def both_ways(self, N: int, M: int, dtype: torch.dtype, device: torch.device) -> tuple[Rounded, Rounded]:
        scale, rows, columns = (torch.empty(shape) for shape in ((), (N, M), (M, N)))
        return Rounded(rows, scale), Rounded(columns, scale)

    def round_both_ways(
        self,
        x: Tensor,
        dtype: torch.dtype,
        bound: Tensor,
        *,
        form: str = "plain",
        before: Tensor | None = None,
        sums: bool = False,
        out: tuple[Rounded, Rounded] | None = None,
    ) -> tuple[Rounded, Rounded, Tensor | None]:
        rows, columns = out or self.both_ways(*x.shape, dtype, x.device)
        x = bounded(x, bound, form, before)
        self.looseness.append(bound.item() / x.abs().max().item())
        power = 2.0 ** bound.log2().floor() / TOP[dtype]
        rows.scale.copy_(power)
        rows.numbers.copy_((x / power).to(dtype).float())
        columns.numbers.copy_(rows.numbers.T)
        return rows, columns, x.sum(0)[None, None] if sums else None

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, bound: Tensor
    ) -> tuple[Rounded, Rounded, tuple[Tensor, Tensor]]:
        h, statistics = reference.layer_norm(x, weight, bias, eps)
        rows, columns, _ = self.round_both_ways(h, dtype, bound)
        return rows, columns, statistics

    def largest(self, x: Tensor) -> Tensor:
        return largest(x)
