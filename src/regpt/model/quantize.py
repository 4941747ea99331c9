"""Frozen weights in 8, 4 or 2 bits: int8 by rows, NF4 with double quantisation (QLoRA, Dettmers et al. 2023), and
ternary numbers (BitNet b1.58, Ma et al. 2024) as GGUF's TQ2_0 has them.

A product dequantizes its weight, forward and backward, and keeps nothing of it: memory holds one such weight at a time.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regpt.model.head import LIBRARY

BLOCK = 64  # weights that share a scale (QLoRA, section 3)
SCALES_BLOCK = 256  # scales that share a second scale (the same)
TERNARY_BLOCK = 256  # numbers that share a scale in ggml's TQ2_0 (QK_K)
# Quantiles of N(0, 1) with an exact zero, divided by the largest (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
Pieces = Mapping[str, Tensor]


def dynamic_table() -> tuple[float, ...]:
    """256 numbers, sorted: a sign, a decimal exponent in unary and a fraction in the bits that are left (Dettmers 2016,
    section 2). QLoRA stores its scales in them."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


@functools.cache
def tables(device: torch.device) -> dict[str, Tensor]:
    """The numbers that codes stand for, float32: of weights (16,) and of scales (256,)."""
    values = {"table": NF4, "scale_table": dynamic_table()}
    return {name: torch.tensor(numbers, dtype=torch.float32, device=device) for name, numbers in values.items()}


def nearest_codes(values: Tensor, table: Tensor) -> Tensor:
    """Indices into the sorted `table` of the entries nearest to `values`, uint8."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def in_blocks(values: Tensor, size: int) -> Tensor:
    """`values` (n,) as (blocks, size), the last block filled with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def to_nf4(weight: Tensor) -> dict[str, Tensor]:
    """`weight` (F, C) in 4.127 bits each: two codes in a byte, the first in its upper half; a scale for each 64 of its
    numbers in row order, in 8 bits with a float32 scale for 256 of them, around the mean scale `offset`."""
    known = tables(weight.device)
    blocks = in_blocks(weight.detach().float().flatten(), BLOCK)
    scales = blocks.abs().amax(1)  # (blocks,)
    codes = nearest_codes(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], known["table"])
    pairs = codes.flatten()[: weight.numel() + weight.numel() % 2].view(-1, 2)
    offset = scales.mean()
    grouped = in_blocks(scales - offset, SCALES_BLOCK)
    scale_scales = grouped.abs().amax(1)
    shares = grouped / scale_scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return {
        "codes": pairs[:, 0] << 4 | pairs[:, 1],
        "scale_codes": nearest_codes(shares, known["scale_table"]).flatten()[: len(scales)],
        "scale_scales": scale_scales,
        "offset": offset,
    }


def from_nf4(pieces: Pieces, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    """(n_out, n_in) of `dtype`, computed in float32; `pieces` with `tables`."""
    codes, count = pieces["codes"], n_out * n_in
    values = pieces["table"][torch.stack((codes >> 4, codes & 15), dim=1).flatten().int()]  # (n,)
    number = torch.arange(len(pieces["scale_codes"]), device=codes.device) // SCALES_BLOCK
    scales = pieces["scale_table"][pieces["scale_codes"].int()] * pieces["scale_scales"][number]
    scales = scales + pieces["offset"]
    if count % BLOCK:
        return (in_blocks(values, BLOCK) * scales[:, None]).flatten()[:count].view(n_out, n_in).to(dtype)
    return (values.view(-1, BLOCK) * scales[:, None]).view(n_out, n_in).to(dtype)


def to_int8(weight: Tensor) -> dict[str, Tensor]:
    """`weight` (F, C) in 8 bits each, its largest number of each row at 127."""
    scales = weight.detach().float().abs().amax(1) / 127
    codes = (weight.detach().float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return {"codes": codes.to(torch.int8), "scales": scales}


def from_int8(pieces: Pieces, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    return (pieces["codes"].float() * pieces["scales"][:, None]).to(dtype)


def to_ternary(weight: Tensor) -> dict[str, Tensor]:
    """`weight` (F, C) in 2.0625 bits each: -1, 0 or 1 times a scale for 256 of its numbers in row order, four of them
    in a byte. Where 256 divides the rows, TQ2_0 stores just that: a scale in float16, here with bfloat16's eight bits,
    so that the weight is the same number in every format.

    Numbers below half the mean size of their block are 0 (absmean: Ma et al. 2024, eq. 1 to 3, there of a whole
    weight). The scale is the mean size of the others, nearest to the weight (Li & Liu 2016): trained adapters
    end 0.06 lower with it (docs/log.md)."""
    numbers = weight.detach().float().flatten()
    sizes, counts = (in_blocks(x, TERNARY_BLOCK) for x in (numbers.abs(), torch.ones_like(numbers)))
    kept = sizes > (sizes.sum(1) / counts.sum(1) / 2)[:, None]  # (blocks, 256)
    scales = (sizes * kept).sum(1) / kept.sum(1).clamp(min=1)
    digits = (in_blocks(numbers, TERNARY_BLOCK).sign() * kept + 1).to(torch.uint8).view(-1, 4)
    codes = digits[:, 0] | digits[:, 1] << 2 | digits[:, 2] << 4 | digits[:, 3] << 6
    return {"codes": codes, "scales": scales.bfloat16().half()}


def from_ternary(pieces: Pieces, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    codes = pieces["codes"]
    digits = torch.stack((codes & 3, codes >> 2 & 3, codes >> 4 & 3, codes >> 6), dim=1)
    values = (digits.view(-1, TERNARY_BLOCK).float() - 1) * pieces["scales"].float()[:, None]
    return values.flatten()[: n_out * n_in].view(n_out, n_in).to(dtype)


Decode = Callable[[Pieces, int, int, torch.dtype], Tensor]


class Format(NamedTuple):
    """How weights are stored.

    Attributes:
        sizes: shapes and types of the pieces of a weight (n_out, n_in).
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Decode
    sizes: Callable[[int, int], dict[str, tuple[tuple[int, ...], torch.dtype]]]


def nf4_sizes(n_out: int, n_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    blocks = -(-n_out * n_in // BLOCK)
    return {
        "codes": ((-(-n_out * n_in // 2),), torch.uint8),
        "scale_codes": ((blocks,), torch.uint8),
        "scale_scales": ((-(-blocks // SCALES_BLOCK),), torch.float32),
        "offset": ((), torch.float32),
    }


def int8_sizes(n_out: int, n_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"codes": ((n_out, n_in), torch.int8), "scales": ((n_out,), torch.float32)}


def ternary_sizes(n_out: int, n_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    blocks = -(-n_out * n_in // TERNARY_BLOCK)
    return {"codes": ((blocks * TERNARY_BLOCK // 4,), torch.uint8), "scales": ((blocks,), torch.float16)}


FORMATS = {
    "nf4": Format(to_nf4, from_nf4, nf4_sizes),
    "int8": Format(to_int8, from_int8, int8_sizes),
    "ternary": Format(to_ternary, from_ternary, ternary_sizes),
}


def dequantize(kind: str, pieces: Pieces, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    """The weight (n_out, n_in) that `pieces` in the format `kind` stand for."""
    decode = in_one_kernel(kind) if pieces["codes"].is_cuda else FORMATS[kind].decode
    return decode({**pieces, **tables(pieces["codes"].device)}, n_out, n_in, dtype)


@functools.cache
def in_one_kernel(kind: str) -> Decode:
    """The decoding of `kind`, whose lines write every intermediate to memory, as one kernel."""
    return torch.compile(FORMATS[kind].decode, dynamic=True)


class QuantizedWeight(nn.Module):
    """A frozen weight (n_out, n_in) in the format `kind`; its pieces are buffers."""

    def __init__(self, kind: str, n_out: int, n_in: int):
        super().__init__()
        self.kind, self.shape = kind, torch.Size((n_out, n_in))
        for name, (shape, dtype) in FORMATS[kind].sizes(n_out, n_in).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def pieces(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    def copy_(self, value: Tensor) -> None:
        """Quantize `value` on the device of this weight, and keep that."""
        own = self.pieces()
        for name, piece in FORMATS[self.kind].encode(value.to(own["codes"].device)).items():
            own[name].copy_(piece)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return torch.ops.regpt.dequantized([*self.pieces().values()], self.kind, self.shape[0], self.shape[1], dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear(x, weight, bias)` in the format of autocast, or of `x`."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
        return torch.ops.regpt.quantized_linear(
            x, [*self.pieces().values()], bias, self.kind, self.shape[0], self.shape[1]
        )


def weight_of(pieces: Sequence[Tensor], kind: str, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    """`dequantize` of pieces in order."""
    return dequantize(kind, dict(zip(FORMATS[kind].sizes(n_out, n_in), pieces)), n_out, n_in, dtype)


# Operations that the compiler does not look into: it would keep the dequantized weights for the backward.


def quantized_linear(
    x: Tensor, pieces: Sequence[Tensor], bias: Tensor | None, kind: str, n_out: int, n_in: int
) -> Tensor:
    return F.linear(x, weight_of(pieces, kind, n_out, n_in, x.dtype), bias)  # (..., n_out)


def quantized_linear_backward(grad: Tensor, pieces: Sequence[Tensor], kind: str, n_out: int, n_in: int) -> Tensor:
    return grad @ weight_of(pieces, kind, n_out, n_in, grad.dtype)  # (..., n_in)


def keep_pieces(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, pieces, _, *ctx.layout = inputs
    ctx.save_for_backward(*pieces)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pieces = [*ctx.saved_tensors]
    dx = torch.ops.regpt.quantized_linear_backward(grad, pieces, *ctx.layout)
    return dx, [None] * len(pieces), None, None, None, None


LAYOUT = "str kind, int n_out, int n_in"
LIBRARY.define(f"quantized_linear(Tensor x, Tensor[] pieces, Tensor? bias, {LAYOUT}) -> Tensor")
LIBRARY.define(f"dequantized(Tensor[] pieces, {LAYOUT}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"quantized_linear_backward(Tensor grad, Tensor[] pieces, {LAYOUT}) -> Tensor")
LIBRARY.impl("dequantized", weight_of, "CompositeExplicitAutograd")
LIBRARY.impl("quantized_linear", quantized_linear, "CompositeExplicitAutograd")
LIBRARY.impl("quantized_linear_backward", quantized_linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "regpt::dequantized",
    lambda pieces, kind, n_out, n_in, dtype: pieces[0].new_empty(n_out, n_in, dtype=dtype),
    lib=LIBRARY,
)
torch.library.register_fake(
    "regpt::quantized_linear", lambda x, pieces, bias, kind, n_out, n_in: x.new_empty(*x.shape[:-1], n_out), lib=LIBRARY
)
torch.library.register_fake(
    "regpt::quantized_linear_backward",
    lambda grad, pieces, kind, n_out, n_in: grad.new_empty(*grad.shape[:-1], n_in),
    lib=LIBRARY,
)
torch.library.register_autograd("regpt::quantized_linear", backward, setup_context=keep_pieces, lib=LIBRARY)
