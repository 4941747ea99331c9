"""MLPs of experts on the tokens that were routed to them: products of groups of rows, each with a matrix of its own.

Dropless (Gale et al. 2023): no expert has a capacity, none drops a token. Shapes: the glossary in `regpt.model`, and
N tokens (B·T), E experts, k experts of a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.model.head import product_dtype

ALIGNMENT = 16  # bytes: what torch's grouped products want rows of both matrices to be multiples of

Matrices = tuple[Tensor, Tensor, Tensor]  # gate and up (E, F, C), down (E, C, F)
GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


class Routing(NamedTuple):
    """A router's decisions on the tokens of one layer.

    Attributes:
        logits: (N, E), float32 (float64 for float64 models).
        chosen: (N, k) int64, experts of each token.
    """

    logits: Tensor
    chosen: Tensor


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows `ends[e - 1]` to `ends[e]` of x (n, C), times the transposed weight (E, F, C) of expert e: (n, F).

    By torch where it can: in bfloat16; eager, in float32 and float16; rows of whole 16 bytes. Else by a loop.
    """
    narrow = x.dtype == torch.bfloat16 or (
        x.dtype in (torch.float32, torch.float16) and not torch.compiler.is_compiling()
    )
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    if narrow and aligned and x.device.type in ("cpu", "cuda"):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return looped_product(x, weight, ends)


def experts_grouped(
    x: Tensor,
    routing: tuple[Tensor, Tensor],
    matrices: Matrices,
    act: Callable[[Tensor], Tensor],
    *,
    product: GroupedProduct = grouped_product,
) -> Tensor:
    """Each token through its own experts: all experts in each of three products, tokens sorted by expert, and back.

    Under autocast products are in its format, like those of `F.linear`.

    Args:
        x: (N, C).
        routing: experts of each token (N, k) int64, different ones; and their weights (N, k).
        matrices: of all experts.
        act: activation of the gate.
        product: of grouped rows.

    Returns:
        (N, C): Σ over a token's k experts of weight · expert(x) (Shazeer et al. 2017, eq. 1), each of them a SwiGLU,
        down(act(gate·x) · up·x) (Shazeer 2020, eq. 6).
    """
    chosen, weights = routing
    dtype, k = product_dtype(x), chosen.size(1)
    gate, up, down = (matrix.to(dtype) for matrix in matrices)
    experts, order = chosen.flatten().sort(stable=True)  # (N·k,)
    numbers = torch.arange(len(gate), device=x.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # (E,): where each expert's tokens end
    rows = x.to(dtype).index_select(0, order // k)  # (N·k, C)
    h = act(product(rows, gate, ends)) * product(rows, up, ends)  # (N·k, F)
    y = product(h, down, ends)  # (N·k, C)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    y = y.index_select(0, back).unflatten(0, (-1, k))  # (N, k, C)
    return (y * weights.to(dtype)[..., None]).sum(1)


# ---- the loop, for formats that torch does not group -----------------------------------------------------------------


def looped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` in every format, compiled or on fake tensors too; waits for the device."""
    return torch.ops.regpt.expert_products(x, weight, ends)


def expert_products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = x.new_empty(len(x), weight.size(1))
    for matrix, rows in zip(weight, groups(ends)):
        torch.mm(x[rows], matrix.t(), out=y[rows])
    return y


def expert_gradients(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """(E, F, C): dyᵀ·x of each expert's rows, zeros without any."""
    gradient = x.new_empty(len(ends), dy.size(1), x.size(1))
    for matrix, rows in zip(gradient, groups(ends)):
        torch.mm(dy[rows].t(), x[rows], out=matrix)
    return gradient


def groups(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops)]


def keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    dx = torch.ops.regpt.expert_products(dy, weight.transpose(1, 2), ends)
    return dx, torch.ops.regpt.expert_gradients(dy, x, ends), None


LIBRARY = torch.library.Library("regpt", "FRAGMENT")  # operations that the compiler does not look into
LIBRARY.define("expert_products(Tensor x, Tensor weight, Tensor ends) -> Tensor")
LIBRARY.define("expert_gradients(Tensor dy, Tensor x, Tensor ends) -> Tensor")
LIBRARY.impl("expert_products", expert_products, "CompositeExplicitAutograd")
LIBRARY.impl("expert_gradients", expert_gradients, "CompositeExplicitAutograd")
torch.library.register_fake(
    "regpt::expert_products", lambda x, weight, ends: x.new_empty(len(x), weight.size(1)), lib=LIBRARY
)
torch.library.register_fake(
    "regpt::expert_gradients",
    lambda dy, x, ends: x.new_empty(len(ends), dy.size(1), x.size(1)),
    lib=LIBRARY,
)
torch.library.register_autograd("regpt::expert_products", backward, setup_context=keep_inputs, lib=LIBRARY)
