"""Each Triton kernel against PyTorch: on a GPU (`make test-gpu`), or on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_triton_ops.py`, with numpy below 2.4).
"""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels import reference

triton = pytest.importorskip("triton")
ops = pytest.importorskip("regpt.kernels.triton_ops")
triton_head = pytest.importorskip("regpt.kernels.triton_head")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
N, C, V, N_VOCAB = 37, 24, 128, 97
EXACT = 2e-6  # float32 against float64
ROUNDED = 4e-3  # results rounded to bfloat16: 2⁻⁹ at most, about half of that in the mean


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) * 100 + shape[0])
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def bound(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float32 else ROUNDED


def test_layer_norm(dtype):
    x, weight, bias = randn(N, C, dtype=dtype), randn(C), randn(C)
    h, (mean, rstd) = ops.layer_norm(x, weight, bias, 1e-5)
    expected, (mean64, rstd64) = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert h.dtype == dtype
    assert relative(h, expected) < bound(dtype)
    assert relative(mean, mean64.flatten()) < EXACT
    assert relative(rstd, rstd64.flatten()) < EXACT


@pytest.mark.parametrize("residual", [True, False])
def test_layer_norm_backward(dtype, residual):
    dh, x, weight = randn(N, C, dtype=dtype), randn(N + 1, C, dtype=dtype)[1:], randn(C)
    dresidual = randn(N + 2, C, dtype=dtype)[2:] if residual else None
    _, (mean, rstd) = ops.layer_norm(x, weight, randn(C), 1e-5)
    dx, sums = ops.layer_norm_backward(dh, x, weight, mean, rstd, dresidual)
    _, norm = reference.layer_norm(x.double(), weight.double(), weight.double(), 1e-5)
    given = None if dresidual is None else dresidual.double()
    expected, expected_sums = reference.layer_norm_backward(dh.double(), x.double(), weight.double(), *norm, given)
    assert relative(dx, expected) < bound(dtype)
    assert relative(sums.double().sum(0), expected_sums[0]) < 1e-5


@pytest.mark.parametrize("residual", [True, False])
def test_rms_norm_and_its_backward(dtype, residual):
    dh, x, weight = randn(N, C, dtype=dtype), randn(N + 1, C, dtype=dtype)[1:], randn(C)
    dresidual = randn(N + 2, C, dtype=dtype)[2:] if residual else None
    h, rstd = ops.rms_norm(x, weight, 1e-5)
    expected, rstd64 = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert relative(h, expected) < bound(dtype)
    assert relative(rstd, rstd64) < EXACT
    dx, sums = ops.rms_norm_backward(dh, x, weight, rstd, dresidual)
    given = None if dresidual is None else dresidual.double()
    expected, expected_sums = reference.rms_norm_backward(dh.double(), x.double(), weight.double(), rstd64, given)
    assert relative(dx, expected) < bound(dtype)
    assert relative(sums.double().sum(0), expected_sums[0]) < 1e-5


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("T", [12, 36], ids=["rows", "documents"])
def test_queries_and_keys_are_rotated_in_place(dtype, T, back):
    D, heads = 6, 5  # of seven: the last two are values
    x, angles = randn(36, 7 * D, dtype=dtype), randn(T, D // 2)
    expected = x.double()
    reference.rotate(expected, angles.double().cos(), angles.double().sin(), D, heads, back=back)
    values = x[:, heads * D :].clone()
    ops.rotate(x, angles.cos(), angles.sin(), D, heads, back=back)
    assert relative(x, expected) < bound(dtype)
    assert torch.equal(x[:, heads * D :], values)


def test_swiglu_and_its_backward(dtype, monkeypatch):
    monkeypatch.setattr(ops, "SWIGLU_BLOCK", 16)  # two blocks, the second cut
    gate_up, dout = randn(N, 2 * C, dtype=dtype) * 3, randn(N, C, dtype=dtype)
    assert relative(ops.swiglu(gate_up), reference.swiglu(gate_up.double())) < bound(dtype)
    expected = reference.swiglu_backward(dout.double(), gate_up.double())
    assert relative(ops.swiglu_backward(dout, gate_up), expected) < bound(dtype)


@pytest.mark.parametrize("programs", [3, 200], ids=["few", "many"])
def test_partial_sums_are_added_or_written(programs):
    partial = randn(programs, 3, C)
    outs = [(torch.ones(C, device=DEVICE), add) for add in (True, False, True)]
    fewer = ops.add_partial_sums(partial, outs)
    total = partial.double().sum(0)
    for k, (out, add) in enumerate(outs):
        assert relative(out, total[k] + add) < EXACT
    assert relative(fewer.double().sum(0), total) < EXACT


def test_column_sums_of_a_part_of_the_columns(dtype):
    x, out = randn(300, 3 * C, dtype=dtype), torch.ones(C, device=DEVICE)
    ops.add_column_sums(x[:, :C], out, add=True)
    assert relative(out, x[:, :C].double().sum(0) + 1) < EXACT


@pytest.mark.parametrize("gradient", [True, False])
def test_cross_entropy_overwrites_the_logits_by_their_gradient(dtype, gradient, monkeypatch):
    monkeypatch.setattr(triton_head, "LOGIT_BLOCK", 32)  # several blocks, the last of them cut
    logits = randn(N, V, dtype=dtype) * 3
    targets = torch.arange(N, device=DEVICE) % N_VOCAB
    targets[5] = -100
    before = logits.clone()
    losses = ops.cross_entropy(logits, targets, N_VOCAB, gradient=gradient)
    wide = before.double()
    expected = reference.cross_entropy(wide, targets, N_VOCAB, gradient=gradient)
    assert relative(losses, expected) < EXACT
    assert losses[5] == 0
    if not gradient:
        assert torch.equal(logits, before)
        return
    assert relative(logits, wide) < bound(dtype)
    assert not logits[:, N_VOCAB:].any()
    assert not logits[5].any()


def test_cross_entropy_of_huge_logits_is_finite():
    logits = torch.full((2, V), -1e4, device=DEVICE)
    logits[0, 3] = 1e4
    losses = ops.cross_entropy(logits.clone(), torch.tensor([3, 3], device=DEVICE), N_VOCAB, gradient=True)
    expected = F.cross_entropy(logits[:, :N_VOCAB].double(), torch.tensor([3, 3], device=DEVICE), reduction="none")
    assert torch.allclose(losses.double(), expected)


@pytest.mark.parametrize("positions", [None, torch.arange(36).view(4, 9) % 5], ids=["rows", "documents"])
def test_embeddings_and_their_gradients(positions):
    idx = torch.arange(36).view(4, 9) % 7
    wte, wpe, dx = randn(V, C), randn(16, C), randn(36, C)
    on = [None if t is None else t.to(DEVICE) for t in (idx, positions)]
    given = ops.embed(*on, wte, wpe, torch.float32)
    expected = reference.embed(idx, positions, wte.cpu().double(), wpe.cpu().double(), torch.float64)
    assert relative(given.cpu(), expected) < EXACT
    given = [torch.ones(V, C, device=DEVICE), torch.ones(16, C, device=DEVICE)]
    expected = [torch.ones(V, C).double(), torch.ones(16, C).double()]
    ops.embed_backward(dx, *on, *given)
    reference.embed_backward(dx.cpu(), idx, positions, *expected)
    for g, e in zip(given, expected):
        assert relative(g.cpu(), e) < EXACT
    alone = torch.ones(V, C, device=DEVICE)  # without learned positions
    ops.embed_backward(dx, *on, alone, None)
    assert relative(alone.cpu(), expected[0]) < EXACT
    assert torch.equal(ops.embed(*on, wte, None, torch.float32).cpu(), wte.cpu()[idx].flatten(0, 1))
