"""Weights in NF4 and int8: against bitsandbytes, against the product with the dequantized weight."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from regpt.model.quantize import (
    FORMATS,
    QuantizedWeight,
    dequantize,
    dynamic_table,
    in_blocks,
    tables,
    to_nf4,
    to_ternary,
)

SHAPES = [(96, 160), (24, 24), (7, 9), (256, 1024)]


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_has_the_codes_and_scales_of_bitsandbytes(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("bitsandbytes.functional")
        weight = weight_of(shape)
        codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = to_nf4(weight)
    assert torch.equal(codes.flatten(), ours["codes"])
    assert torch.equal(state.state2.absmax, ours["scale_scales"])
    assert state.offset == ours["offset"]
    assert (state.state2.code - torch.tensor(dynamic_table())).abs().max() <= 1e-7
    # Where a scale lies almost between two codes, their CPU kernel may take the farther one.
    scales = in_blocks(weight.flatten(), 64).abs().amax(1)
    shares = (in_blocks(scales - scales.mean(), 256) / ours["scale_scales"][:, None]).flatten()[: len(scales)]
    table = tables(weight.device)["scale_table"]
    mine, other = (table[codes.flatten().int()] for codes in (ours["scale_codes"], state.absmax))
    assert (mine != other).sum() <= max(1, 0.003 * len(scales))
    shares = shares.nan_to_num()  # of a single scale, which is its own mean
    assert ((shares - mine).abs() <= (shares - other).abs()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_that_of_the_format(shape):
    weight = weight_of(shape)
    for kind, error in {"nf4": 0.1, "int8": 0.012, "ternary": 0.48}.items():
        pieces = FORMATS[kind].encode(weight)
        found = dequantize(kind, pieces, *shape, torch.float32)
        assert (found - weight).norm() / weight.norm() < error
        sizes = FORMATS[kind].sizes(*shape)
        assert {name: (tuple(p.shape), p.dtype) for name, p in pieces.items()} == sizes
    assert not dequantize("nf4", to_nf4(torch.zeros(3, 5)), 3, 5, torch.float32).any()


def test_nf4_takes_half_a_byte_and_a_little_a_weight():
    pieces = to_nf4(torch.randn(256, 1024))
    assert 8 * sum(p.nbytes for p in pieces.values()) / 2**18 == pytest.approx(4.127, abs=5e-4)


def test_a_ternary_weight_is_the_same_number_in_every_format_and_in_tq2_0():
    quants = pytest.importorskip("gguf.quants")
    weight = weight_of((48, 512)) * torch.logspace(-2, 1, 48)[:, None]
    weight[5] = 0
    pieces = to_ternary(weight)
    found = dequantize("ternary", pieces, 48, 512, torch.float32)
    assert torch.equal(found, dequantize("ternary", pieces, 48, 512, torch.bfloat16).float())
    theirs = quants.quantize(found.numpy(), quants.GGMLQuantizationType.TQ2_0)
    assert torch.equal(torch.from_numpy(quants.dequantize(theirs, quants.GGMLQuantizationType.TQ2_0)), found)
    assert 8 * sum(p.nbytes for p in pieces.values()) / weight.numel() == 2.0625
    blocks = weight.view(-1, 256).double()
    digits = (blocks / blocks.abs().mean(1, keepdim=True)).round().clamp(-1, 1).nan_to_num()  # Ma et al. 2024, eq. 1
    best = (digits * blocks).sum(1, keepdim=True) / digits.square().sum(1, keepdim=True)  # of least squares
    expected = digits * best.nan_to_num().float().bfloat16()
    assert torch.equal(found.view(-1, 256), expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_dequantized_weight(kind: str, dtype: torch.dtype):
    stored = QuantizedWeight(kind, 96, 160)
    stored.copy_(weight_of((96, 160)))
    x, bias = torch.randn(2, 5, 160, dtype=dtype, requires_grad=True), torch.randn(96)
    y, expected = stored.product(x, bias), F.linear(x, stored.dequantized(dtype), bias.to(dtype))
    assert torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
    assert torch.equal(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stored.product(x.detach().float(), bias).dtype == torch.bfloat16
