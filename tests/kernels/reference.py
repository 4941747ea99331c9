"""The pieces of the fused path in plain PyTorch, with the signatures of `cublaslt.Products` and of `triton_ops`: what
they mean, in any precision and on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_gradient(before: Tensor) -> Tensor:
    with torch.enable_grad():
        x = before.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]


def products(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    epilogue: str = "none",
    bias: Tensor | None = None,
    aux: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    fast: bool = False,
) -> Tensor:
    wide = torch.float64 if a.dtype.itemsize > 2 else torch.float32
    result = (a.T if transpose_a else a).to(wide) @ (b.T if transpose_b else b).to(wide)
    for factor in (scale, *(scales or ())):
        result = result if factor is None else result * factor.to(wide)
    if add is not None:
        result = result + add.to(wide)
    if bias is not None:
        result = result + bias.to(wide)
    if epilogue == "gelu_aux_bias":
        assert aux is not None
        aux.copy_(result)
        result = F.gelu(aux.to(wide), approximate="tanh")
    if epilogue == "dgelu":
        assert aux is not None
        result = result * gelu_gradient(aux.to(wide))
    return out.copy_(result)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    h, mean, rstd = torch.native_layer_norm(x, (x.size(1),), weight, bias, eps)
    return h, (mean, rstd)


def layer_norm_backward(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    longest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    bias = torch.zeros_like(weight)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dh, x, (x.size(1),), mean, rstd, weight, bias, [True, True, True]
    )
    dx = dx if dresidual is None else dx + dresidual
    if longest is not None:
        longest.copy_(torch.maximum(longest, dx.norm(dim=1).max()))
    return dx, torch.stack([dweight, dbias, dx.sum(0)])[None]


def add_partial_sums(partial: Tensor, outs: list[tuple[Tensor, bool]]) -> Tensor:
    for k, (out, add) in enumerate(outs):
        total = partial[:, k].sum(0)
        out.copy_(out + total if add else total)
    return partial


def add_column_sums(x: Tensor, out: Tensor, add: bool) -> None:
    out.copy_(out + x.sum(0) if add else x.sum(0))


def cross_entropy(logits: Tensor, targets: Tensor, n_vocab: int, *, gradient: bool) -> Tensor:
    with torch.enable_grad():
        given = logits[:, :n_vocab].detach().clone().requires_grad_()
        losses = F.cross_entropy(given, targets, reduction="none")
        if gradient:
            logits.zero_()
            logits[:, :n_vocab] = torch.autograd.grad(losses.sum(), given)[0]
    return losses.detach()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float() if x.dtype.itemsize == 2 else x
    rstd = torch.rsqrt(wide.square().mean(1) + eps)
    return (wide * rstd[:, None] * weight).to(x.dtype), rstd


def rms_norm_backward(
    dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        given, scale = x.detach().requires_grad_(), weight.detach().requires_grad_()
        eps = (rstd**-2 - x.square().mean(1))[:, None]
        h = given * torch.rsqrt(given.square().mean(1, keepdim=True) + eps) * scale
        dx, dweight = torch.autograd.grad(h, (given, scale), dh)
    return dx if dresidual is None else dx + dresidual, dweight[None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, heads: int, *, back: bool = False) -> None:
    """As complex numbers: pair (i, i + D/2) times e^iφ."""
    cos, sin = (y.reshape(-1, head_size // 2).repeat(len(x) * head_size // 2 // y.numel(), 1) for y in (cos, sin))
    by = torch.complex(cos, -sin if back else sin).to(torch.complex128)[:, None]  # (N, 1, D/2)
    part = x[:, : heads * head_size].view(len(x), heads, 2, head_size // 2)
    turned = torch.complex(part[:, :, 0].double(), part[:, :, 1].double()) * by
    part[:, :, 0], part[:, :, 1] = turned.real, turned.imag


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    with torch.enable_grad():
        given = gate_up.detach().requires_grad_()
        return torch.autograd.grad(swiglu(given), given, dout)[0]


def embed(idx: Tensor, positions: Tensor | None, wte: Tensor, wpe: Tensor | None, dtype: torch.dtype) -> Tensor:
    if wpe is None:
        return wte[idx].flatten(0, 1).detach().to(dtype)
    at = torch.arange(idx.size(1)).expand(idx.shape) if positions is None else positions
    return (wte[idx] + wpe[at]).flatten(0, 1).detach().to(dtype)


def embed_backward(dx: Tensor, idx: Tensor, positions: Tensor | None, dwte: Tensor, dwpe: Tensor | None) -> None:
    dwte.index_add_(0, idx.flatten(), dx.to(dwte.dtype))
    if dwpe is None:
        return
    at = torch.arange(idx.size(1)).expand(idx.shape) if positions is None else positions
    dwpe.index_add_(0, at.flatten(), dx.to(dwpe.dtype))
