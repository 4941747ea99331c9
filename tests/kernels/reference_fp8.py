"""`triton_fp8` in plain PyTorch, which sees to it that no number exceeds its bound."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from regpt.kernels.fp8 import TOP, Rounded


class Rounding:
    """The functions of `triton_fp8`, for products that take no FP8: the rounded numbers are of `wide`.

    Args:
        wide: float32: numbers that FP8 can hold; float64: nothing is rounded.

    Attributes:
        looseness: how many times the largest number each bound was.
    """

    def __init__(self, wide: torch.dtype):
        self.wide = wide
        self.looseness: list[float] = []

    def both_ways(self, N: int, M: int, dtype: torch.dtype, device: torch.device) -> tuple[Rounded, Rounded]:
        scale, rows, columns = (torch.ones(shape, dtype=self.wide, device=device) for shape in ((), (N, M), (M, N)))
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
        if form == "gelu":
            x = F.gelu(x, approximate="tanh")
        if form == "dgelu":
            assert before is not None
            x = x * reference.gelu_gradient(before)
        self.looseness.append(bound.item() / x.abs().max().item())
        assert not self.looseness[-1] <= 1 - 1e-6  # bounds are float32; NaN passes, as it does on the device
        rows, columns = out or self.both_ways(*x.shape, dtype, x.device)
        rows.numbers.copy_(x)
        if self.wide == torch.float32:
            rows.scale.copy_(2.0 ** bound.log2().floor() / TOP[dtype])
            rows.numbers.copy_((x / rows.scale).to(dtype))
        columns.numbers.copy_(rows.numbers.T)
        return rows, columns, x.sum(0)[None, None] if sums else None

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, bound: Tensor
    ) -> tuple[Rounded, Rounded, tuple[Tensor, Tensor]]:
        h, statistics = reference.layer_norm(x, weight, bias, eps)
        rows, columns, _ = self.round_both_ways(h, dtype, bound)
        return rows, columns, statistics

    def largest(self, x: Tensor) -> Tensor:
        return x.abs().max().float()
