"""Each kernel that rounds to FP8 against PyTorch and `kernels.fp8`: on a GPU, or on a CPU, see test_triton_ops.py."""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from regpt.kernels import fp8

triton = pytest.importorskip("triton")
ops = pytest.importorskip("regpt.kernels.triton_fp8")
norms = pytest.importorskip("regpt.kernels.triton_ops")
pytestmark = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = [(144, 80), (256, 192)]  # the first is no multiple of what a program takes
FORMATS = [fp8.E4M3, fp8.E5M2]
# Triton's interpreter (3.9) rounds halves up and loses carries into the exponent: up to 7 % of all numbers.
DIFFERENT = 0.08 if INTERPRETED else 0.0
HALF_STEP = {fp8.E4M3: 2.0**-4, fp8.E5M2: 2.0**-3}  # the most that rounding changes a normal number by, of itself


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def value(rounded: fp8.Rounded) -> torch.Tensor:
    return rounded.numbers.double() * rounded.scale.double()


def by_torch(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers, scale = fp8.quantized(x, dtype)
    return numbers.double() * scale.double()


def differing(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of numbers that are not the same."""
    return (given != expected).double().mean().item()


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32], ids=str)
def test_with_the_maximum_as_bound_it_is_the_rounding_of_the_plain_path(shape, dtype, wide):
    x = 1e-6 * randn(*shape, dtype=wide)
    rows, columns, sums = ops.round_both_ways(x, dtype, x.abs().max().float())
    assert sums is None
    assert rows.scale.item() == columns.scale.item() == fp8.quantized(x, dtype)[1].item()
    assert rows.numbers.dtype == columns.numbers.dtype == dtype
    assert differing(value(rows), by_torch(x, dtype)) <= DIFFERENT
    assert torch.equal(value(columns), value(rows).T)
    assert columns.numbers.is_contiguous()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_a_bound_that_is_too_large_costs_no_precision(size, dtype):
    x = size * randn(144, 80, dtype=torch.float32).abs().clamp(min=2.0**-6)
    rows, _, _ = ops.round_both_ways(x, dtype, 32 * x.max())
    assert value(rows).abs().max() < 64 * x.max().item()
    assert differing(value(rows), by_torch(x, dtype)) <= DIFFERENT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "gelu", "dgelu"])
def test_gelu_its_derivative_and_sums_on_the_way(shape, form):
    x, before = randn(*shape), randn(*shape, seed=1)
    wide, wide_before = x.double(), before.double()
    expected = {
        "plain": lambda: wide,
        "gelu": lambda: F.gelu(wide, approximate="tanh"),
        "dgelu": lambda: wide * reference.gelu_gradient(wide_before),
    }[form]()
    bound = expected.abs().max().float()
    given = before if form == "dgelu" else None
    rows, columns, sums = ops.round_both_ways(x, fp8.E4M3, bound, form=form, before=given, sums=True)
    # A number may be above a half in float32 and below it in float64, or the reverse.
    assert differing(value(rows), by_torch(expected.float(), fp8.E4M3)) <= DIFFERENT + 0.001
    assert torch.equal(value(columns), value(rows).T)
    total = torch.full(shape[1:], 0.5, device=DEVICE)
    norms.add_partial_sums(sums, [(total, True)])
    torch.testing.assert_close(total.double(), 0.5 + expected.sum(0), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("N", "C"), [(144, 80), (128, 768)])
def test_layer_norm(N, C):
    x, weight, bias = 3 + randn(N, C), randn(C, dtype=torch.float32), randn(C, seed=1, dtype=torch.float32)
    expected, (mean, rstd) = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    bound = C**0.5 * weight.abs().max() + bias.abs().max()
    assert expected.abs().max() < bound
    rows, columns, (found_mean, found_rstd) = ops.layer_norm(x, weight, bias, 1e-5, fp8.E4M3, bound)
    torch.testing.assert_close(found_mean.double(), mean.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_rstd.double(), rstd.flatten(), rtol=1e-5, atol=1e-6)
    assert torch.equal(value(columns), value(rows).T)
    least = 2.0**-6 * rows.scale.double()  # below, steps are of one size
    wrong = (value(rows) - expected).abs() / expected.abs().clamp(min=least)
    assert (wrong > 1.001 * HALF_STEP[fp8.E4M3]).double().mean() <= DIFFERENT
    assert INTERPRETED or 0.02 < relative(value(rows), expected) < 0.035


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_number_and_the_longest_row(shape):
    x = randn(*shape)
    x[-1, -1] = -7
    assert ops.largest(x).item() == 7
    weight, longest = randn(shape[1], dtype=torch.float32), torch.zeros((), device=DEVICE)
    _, (mean, rstd) = norms.layer_norm(x, weight, weight, 1e-5)
    dx, _ = norms.layer_norm_backward(randn(*shape, seed=2), x, weight, mean, rstd, None, longest=longest)
    assert longest.item() == pytest.approx(dx.double().norm(dim=1).max().item(), rel=5e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_zeros_stay_and_what_is_not_finite_shows(dtype):
    x = torch.zeros(16, 16, device=DEVICE)
    assert not value(ops.round_both_ways(x, dtype, x.max())[0]).any()
    for bad in (float("nan"), float("inf")):
        rows, _, _ = ops.round_both_ways(torch.full_like(x, bad), dtype, torch.tensor(bad, device=DEVICE))
        assert not value(rows).isfinite().any()
    if INTERPRETED:
        return  # it loses what is not a number, too
    x[3, 5] = float("nan")  # where the bound has not seen it
    rows, columns, _ = ops.round_both_ways(x, dtype, torch.ones((), device=DEVICE))
    assert value(rows)[3, 5].isnan()
    assert value(columns)[5, 3].isnan()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds wrongly")
def test_what_is_stored_is_checked_before_use(monkeypatch):
    assert ops.obstacle(DEVICE, 768) is None
    honest = ops.round_both_ways

    def spoiled(*args, **options):
        rows, columns, sums = honest(*args, **options)
        if options.get("form") == "dgelu":
            columns.numbers.view(torch.uint8)[3, 5] ^= 1
        return rows, columns, sums

    monkeypatch.setattr(ops, "round_both_ways", spoiled)
    assert "compiles its rounding to FP8 wrongly" in ops.obstacle(DEVICE, 768)
