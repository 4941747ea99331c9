"""The head's kernel against `model.head`, on a GPU or in Triton's interpreter (see `test_triton_ops.py`)."""

import os

import pytest
import torch

from regpt.model import head
from regpt.model.head import IGNORE_INDEX
from regpt.model.ops import PLAIN

triton = pytest.importorskip("triton")
triton_head = pytest.importorskip("regpt.kernels.triton_head")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
N, C, V, N_VOCAB = 37, 24, 128, 97
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # against float64; results rounded to bfloat16


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


def targets_of(n: int) -> torch.Tensor:
    targets = torch.arange(n, device=DEVICE) % N_VOCAB
    targets[5] = IGNORE_INDEX
    return targets


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_chunk_becomes_its_gradient(dtype, softcap: float, z_loss: float, gradient: bool, monkeypatch):
    monkeypatch.setattr(triton_head, "LOGIT_BLOCK", 32)  # several blocks, the last of them cut
    logits = randn(N, V, dtype=dtype) * 3
    wide = logits.double()
    given = targets_of(N), N_VOCAB, softcap, z_loss, gradient
    losses, log_z = triton_head.softmax_in_place(logits, *given)
    expected, expected_log_z = head.softmax_in_place(wide, *given)
    assert relative(losses, expected) < 2e-6
    assert relative(log_z, expected_log_z) < 2e-6
    assert (losses[5], log_z[5]) == (0, 0)
    if gradient:
        assert relative(logits, wide) < BOUNDS[dtype]
        assert not logits[:, N_VOCAB:].any()
        assert not logits[5].any()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_an_op_with_the_kernel_has_the_gradients_of_the_plain_one(dtype, z_loss: float, monkeypatch):
    monkeypatch.setattr(head, "chunk_rows", lambda N, V, dtype: 10)
    found = []
    for ops, of in ((triton_head.in_one_kernel(PLAIN), dtype), (PLAIN, torch.float64)):
        hidden, weight = (randn(n, C, dtype=dtype).to(of).requires_grad_() for n in (N, V))
        given = hidden, weight, targets_of(N), N_VOCAB
        if z_loss:
            loss, squares = ops.cross_entropy_with_z_loss(*given, z_loss)
        else:
            loss, squares = ops.linear_cross_entropy(*given), torch.ones(1)
        found.append([loss.detach(), squares, *torch.autograd.grad(loss / 7, (hidden, weight))])
    for given, expected in zip(*found):
        assert relative(given.cpu(), expected.cpu()) < 2 * BOUNDS[dtype]


def test_huge_logits_are_finite():
    logits = torch.full((2, V), -1e4, device=DEVICE)
    logits[0, 3] = 1e4
    losses, log_z = triton_head.softmax_in_place(logits, torch.tensor([3, 3], device=DEVICE), N_VOCAB, 0.0, 0.0, True)
    log_vocab = torch.tensor(float(N_VOCAB)).log()
    assert torch.allclose(losses.cpu(), torch.stack([torch.zeros(()), log_vocab]))
    assert logits.isfinite().all()
    assert torch.allclose(log_z.cpu(), torch.stack([torch.tensor(1e4), log_vocab - 1e4]))
