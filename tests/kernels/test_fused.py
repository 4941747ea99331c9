"""The hand-written forward and backward, with its pieces in float64: the mathematics, on any machine."""

from dataclasses import replace

import pytest
import torch

import tiny
from kernels import reference
from kernels.reference_fp8 import Rounding
from regpt.data.batch import Batch
from regpt.kernels import fused as kernels_fused
from regpt.kernels.fused import FusedLoss
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.gpt2_fp8 import FusedGPT2FP8
from regpt.kernels.llama import FusedLlama
from regpt.kernels.masked import TorchAttention
from regpt.kernels.select import ops_of
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.llama import Llama
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig
from regpt.train.optim import make_optimizer

DOCUMENTS = {"positions": torch.arange(12).expand(8, 12) % 6, "cu_seqlens": torch.arange(0, 97, 6)}


LLAMA = tiny.FAMILY_CONFIGS["llama"]
MODELS = {
    "gpt2": tiny.CONFIG,
    "llama": LLAMA,
    "untied": replace(LLAMA, tie_embeddings=False),
    "llama3": replace(LLAMA, n_kv_head=3, rope_type="llama3", rope_factor=8.0, rope_original_max_seq_len=8),
}


def fused(model, precision: str = "bf16") -> FusedLoss:
    pieces = reference.products, TorchAttention(), reference
    if isinstance(model, Llama):
        return FusedLlama(model, *pieces, torch.float64)
    if precision == "fp8":
        return FusedGPT2FP8(model, *pieces, Rounding(torch.float64), dtype=torch.float64)
    return FusedGPT2(model, *pieces, torch.float64)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def both_ways(calls: int = 1, precision: str = "bf16", config: ModelConfig = tiny.CONFIG, **documents: torch.Tensor):
    """Loss and gradients of `calls` micro-batches added up, fused and plain."""
    found = []
    for way in ("fused", "plain"):
        model = tiny.build_model(config=config)
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


@pytest.mark.parametrize("documents", [{}, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("name", ["llama", "untied", "llama3"])
def test_loss_and_gradients_of_a_llama_are_those_of_the_plain_path(name, documents):
    for calls in (1, 3):  # gradients made, joined, and added to
        given, expected = both_ways(calls, config=MODELS[name], **documents)
        assert tiny.largest_error(given, expected) < 1e-13


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
@pytest.mark.parametrize("name", ["gpt2", "llama", "untied"])
def test_a_head_of_a_large_vocabulary_is_computed_in_chunks_of_rows(name, rows, monkeypatch):
    monkeypatch.setattr(kernels_fused, "SMALL_VOCAB", 100)
    monkeypatch.setattr(kernels_fused, "CHUNK_BYTES", rows * 128 * 8)
    for calls in (1, 2):
        given, expected = both_ways(calls, config=MODELS[name])
        assert tiny.largest_error(given, expected) < 1e-13
    model = tiny.build_model(config=MODELS[name])
    with torch.no_grad():
        assert fused(model).loss_sum(*tiny.Rows().rows(0)).item() == pytest.approx(
            make_loss_sum(model, "fp64", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0))).item(), rel=1e-13
        )


@pytest.mark.parametrize(("n", "most", "rows"), [(16384, 4186, 4096), (16384, 3840, 3328), (96, 40, 32), (5, 0, 1)])
def test_chunks_are_even(n, most, rows):
    assert kernels_fused.even_chunks(n, most) == rows


def test_gradients_that_were_there_before_are_joined_and_kept():
    """The trainer allocates them; the optimizer and the clipping then see slices of one matrix."""
    model = tiny.build_model(config=LLAMA)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    path = fused(model)
    path.loss_sum(*tiny.Rows().rows(0)).backward()
    where = [p.grad.data_ptr() for p in model.parameters()]
    expected = tiny.build_model(config=LLAMA)
    make_loss_sum(expected, "fp64", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0))).backward()
    for given, plain in zip(model.parameters(), expected.parameters()):
        assert torch.allclose(given.grad - 1, plain.grad, rtol=0, atol=1e-12)
    path.loss_sum(*tiny.Rows().rows(0)).backward()
    assert where == [p.grad.data_ptr() for p in model.parameters()]


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


# ---- in FP8 ----------------------------------------------------------------------------------------------------------


def rounded(model, rounding: Rounding) -> FusedGPT2FP8:
    return FusedGPT2FP8(model, reference.products, TorchAttention(), reference, rounding, dtype=torch.float32)


def wider(precision: str) -> Transformer:
    ops = ops_of(precision, tiny.CPU)
    return initialize(make_model(replace(tiny.CONFIG, n_embd=64, n_head=4), ops), 0)


def test_what_is_rounded_to_fp8_stays_within_its_bounds_and_learns_like_fp8_layers():
    """Weights, and with them the bounds, change with every update; each rounding asserts its bound."""
    losses: dict[str, list[float]] = {}
    rounding = Rounding(torch.float32)
    for way in ("fp32", "layers", "fused"):
        model = wider("fp8" if way == "layers" else "fp32")
        plain = make_loss_sum(model, "fp8" if way == "layers" else "fp32", tiny.CPU, compile=False)
        of_tokens = rounded(model, rounding).loss_sum if way == "fused" else None
        optimizer = make_optimizer(model, OptimConfig(lr=1e-3), tiny.CPU)
        losses[way] = []
        for step in range(60):
            idx, targets = tiny.Rows().rows(step % 2)
            loss = of_tokens(idx, targets) if of_tokens else plain(Batch(idx, targets))
            (loss / (targets >= 0).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses[way].append(loss.item() / (targets >= 0).sum().item())
    assert losses["fp32"][-1] < losses["fp32"][0] - 3
    farthest = {
        way: max(abs(a - b) for a, b in zip(losses[way], losses["fp32"])) for way in ("layers", "fused")
    }  # 0.011 and 0.014
    assert 0.002 < farthest["layers"] < 0.03
    assert 0.002 < farthest["fused"] < 0.03
    assert max(rounding.looseness) < 64  # far inside the 15 binades of e4m3


def test_gradients_in_fp8_are_as_exact_as_those_of_fp8_layers():
    wrong: dict[str, dict[str, float]] = {}
    reference_model = wider("fp32")
    make_loss_sum(reference_model, "fp32", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0))).backward()
    expected = gradients(reference_model)
    for way in ("layers", "fused"):
        model = wider("fp8" if way == "layers" else "fp32")
        if way == "layers":
            loss = make_loss_sum(model, "fp8", tiny.CPU, compile=False)(Batch(*tiny.Rows().rows(0)))
        else:
            loss = rounded(model, Rounding(torch.float32)).loss_sum(*tiny.Rows().rows(0))
        loss.backward()
        wrong[way] = {
            name: ((gradient - expected[name]).norm() / expected[name].norm()).item()
            for name, gradient in gradients(model).items()
        }
    for name, layers in wrong["layers"].items():
        assert wrong["fused"][name] < 1.5 * layers, (name, wrong["fused"][name], layers)
    assert 0.05 < max(wrong["fused"].values()) < 0.2


def test_rows_that_fp8_cannot_take_are_computed_as_without_it():
    model, given = tiny.build_model(), [t[:5, :7].contiguous() for t in tiny.Rows().rows(0)]  # 35 tokens
    path = fused(model, "fp8")
    path.copy_weights()
    path.rounding = None  # nothing is rounded
    path.loss_sum(*given).backward()
    found = gradients(model)
    model.zero_grad()
    fused(model).loss_sum(*given).backward()
    assert tiny.largest_error(found, gradients(model)) == 0
    with torch.no_grad():
        whole = tiny.Rows().rows(0)
        assert path.loss_sum(*whole).item() == fused(model).loss_sum(*whole).item()


@pytest.mark.parametrize("function", ["_foreach_copy_", "_foreach_norm"])
def test_copies_that_found_no_memory_are_made_at_the_next_try(monkeypatch, function):
    model = tiny.build_model()
    path = fused(model, "fp8")
    path.loss_sum(*tiny.Rows().rows(0))
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(2)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, function, fail)
        with pytest.raises(torch.OutOfMemoryError):
            path.loss_sum(*tiny.Rows().rows(0))
    expected = fused(model, "fp8").loss_sum(*tiny.Rows().rows(0))
    assert path.loss_sum(*tiny.Rows().rows(0)).item() == expected.item()
