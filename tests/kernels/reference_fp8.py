"""`triton_fp8` in plain PyTorch. In float64 nothing is rounded: what remains is that no number exceeds its bound."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from regpt.kernels.fp8 import Rounded

looseness: list[float] = []  # of every bound that was used


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
    if form == "gelu":
        x = F.gelu(x, approximate="tanh")
    if form == "dgelu":
        assert before is not None
        x = x * reference.gelu_gradient(before)
    assert 0 < x.abs().max().item() <= bound.item() * (1 + 1e-6)  # bounds are float32
    looseness.append(bound.item() / x.abs().max().item())
    rows.numbers.copy_(x)
    columns.numbers.copy_(x.T)
    return rows, columns, x.sum(0)[None, None] if sums else None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, bound: Tensor
) -> tuple[Rounded, Rounded, tuple[Tensor, Tensor]]:
    h, statistics = reference.layer_norm(x, weight, bias, eps)
    rows, columns, _ = round_both_ways(h, dtype, bound)
    return rows, columns, statistics


def largest(x: Tensor) -> Tensor:
    return x.abs().max().float()
