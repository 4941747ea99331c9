"""The hand-written forward and backward, with its pieces in float64: the mathematics, on any machine."""

import pytest
import torch

import tiny
from kernels import reference, reference_fp8
from regpt.data.batch import Batch
from regpt.kernels.attention import TorchAttention
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.gpt2_fp8 import FusedGPT2FP8
from regpt.train.config import OptimConfig
from regpt.train.loss import make_loss_sum
from regpt.train.optim import make_optimizer

DOCUMENTS = {"positions": torch.arange(12).expand(8, 12) % 6, "cu_seqlens": torch.arange(0, 97, 6)}


def fused(model, precision: str = "bf16") -> FusedGPT2:
    pieces = reference.products, TorchAttention(), reference
    if precision == "fp8":
        return FusedGPT2FP8(model, *pieces, reference_fp8, dtype=torch.float64)
    return FusedGPT2(model, *pieces, torch.float64)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def both_ways(calls: int = 1, precision: str = "bf16", **documents: torch.Tensor):
    """Loss and gradients of `calls` micro-batches added up, fused and plain."""
    found = []
    for way in ("fused", "plain"):
        model = tiny.build_model()
        plain = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
        of_tokens = fused(model, precision).loss_sum if way == "fused" else lambda *batch: plain(Batch(*batch))  # noqa: B023
        for step in range(calls):
            loss = of_tokens(*tiny.Rows().rows(step), documents.get("positions"), documents.get("cu_seqlens"))
            (loss / 7).backward()
        found.append({"loss": loss.detach()} | gradients(model))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("documents", [{}, DOCUMENTS], ids=["rows", "documents"])
def test_loss_and_gradients_are_those_of_the_plain_path(documents, precision):
    given, expected = both_ways(precision=precision, **documents)
    assert tiny.largest_error(given, expected) < 1e-13


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_second_micro_batch_adds_to_the_gradients_of_the_first(precision):
    given, expected = both_ways(calls=2, precision=precision)
    assert tiny.largest_error(given, expected) < 1e-13


def test_the_padding_of_the_vocabulary_gets_no_gradient():
    model = tiny.build_model()
    fused(model).loss_sum(*tiny.Rows().rows(0)).backward()
    assert not model.wte.weight.grad[tiny.CONFIG.vocab_size :].any()


def test_without_gradients_only_the_loss_is_computed():
    model = tiny.build_model()
    with torch.no_grad():
        loss = fused(model).loss_sum(*tiny.Rows().rows(0))
    plain = make_loss_sum(model, "fp64", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0)))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-14)
    assert not loss.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_the_copies_of_the_weights_follow_an_update():
    model = tiny.build_model()
    path = fused(model)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1), tiny.CPU)
    before = path.loss_sum(*tiny.Rows().rows(0))
    before.backward()
    optimizer.step()
    after = path.loss_sum(*tiny.Rows().rows(0))
    assert after.item() < before.item()
    plain = make_loss_sum(model, "fp64", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0)))
    assert after.item() == pytest.approx(plain.item(), rel=1e-13)


def test_a_backward_twice_through_one_loss_is_refused():
    loss = fused(tiny.build_model()).loss_sum(*tiny.Rows().rows(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
