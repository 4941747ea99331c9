"""The fused path as a GPU runs it, against float32 and against the plain path in bfloat16."""

import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.kept import Kept
from regpt.data.batch import Batch
from regpt.kernels import fused as fused_head
from regpt.kernels.select import fused_loss, select_kernels
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig
from regpt.train.optim import make_optimizer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=256, vocab_size=1000, max_seq_len=256)
LLAMA = replace(CONFIG, family="llama", n_kv_head=2, n_inner=688)
B, T = 6, 256


def build(config: ModelConfig = CONFIG) -> Transformer:
    model = make_model(config).to(DEVICE)
    initialize(model, 0)
    return model


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(B, T, generator=generator) < 0.2, -100)
    return ids[:, :-1].contiguous().to(DEVICE), targets.contiguous().to(DEVICE)


def documents() -> dict[str, torch.Tensor]:
    """Documents of many lengths, cut where rows end; padded with empty ones to a power of two."""
    lengths = torch.tensor([5, 96, 155, 256, 7, 249, 256, 128, 128, 256])
    cu = F.pad(lengths.cumsum(0), (1, 6), value=B * T)
    cu[0] = 0
    positions = torch.cat([torch.arange(n) for n in lengths]).view(B, T)
    return {"positions": positions.to(DEVICE), "cu_seqlens": cu.to(DEVICE)}


def gradients(model: Transformer, loss_sum, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_sum(Batch(*tokens(), **given)) / (B * T)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def error(given, expected) -> dict[str, float]:
    return {
        name: ((given[name] - exact).norm() / exact.norm().clamp(min=1e-12)).item() for name, exact in expected.items()
    }


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "untied", "chunks"])
def test_the_fused_path_is_as_exact_as_the_plain_one_in_bfloat16(name, masked, monkeypatch):
    config = CONFIG if name == "gpt2" else replace(LLAMA, tie_embeddings=name != "untied")
    if name == "chunks":
        monkeypatch.setattr(fused_head, "SMALL_VOCAB", 0)
        monkeypatch.setattr(fused_head, "CHUNK_BYTES", 2 * 1024 * 300)
    model, given = build(config), documents() if masked else {}
    assert select_kernels("auto", model, DEVICE, "bf16").name == "fused"
    exact = gradients(model, make_loss_sum(model, "fp32", DEVICE, compile=False), **given)
    plain = error(gradients(model, make_loss_sum(model, "bf16", DEVICE, compile=False), **given), exact)
    fused = error(gradients(model, make_loss_sum(model, "bf16", DEVICE, True, "fused"), **given), exact)
    for name, bound in plain.items():
        assert fused[name] < max(1.6 * bound, 1e-4), f"{name}: fused {fused[name]:.1e}, plain {bound:.1e}"


def test_each_document_is_computed_as_if_it_were_alone():
    model, given = build(), documents()
    loss_sum = fused_loss(model, DEVICE)
    idx, targets = tokens()
    together = gradients(model, lambda batch: loss_sum(*batch[:4]), **given)
    model.zero_grad()
    starts = given["cu_seqlens"].unique().tolist()
    total = 0.0
    for start, end in pairwise(starts):
        alone = loss_sum(idx.view(1, -1)[:, start:end], targets.view(1, -1)[:, start:end]) / (B * T)
        alone.backward()
        total += alone.item()
    assert total == pytest.approx(together["loss"].item(), rel=2e-4)
    for name, p in model.named_parameters():
        assert ((p.grad - together[name]).norm() / together[name].norm()).item() < 2e-2, name


def test_micro_batches_add_up_and_updates_are_seen():
    model = build()
    loss_sum = fused_loss(model, DEVICE)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2), DEVICE)
    whole = gradients(model, lambda batch: loss_sum(*batch[:4]))
    model.zero_grad()
    idx, targets = tokens()
    for half in (slice(0, 3), slice(3, 6)):
        (loss_sum(idx[half], targets[half]) / (B * T)).backward()
    for name, p in model.named_parameters():
        assert ((p.grad - whole[name]).norm() / whole[name].norm()).item() < 1e-2, name
    optimizer.step()
    with torch.no_grad():
        after = loss_sum(idx, targets).item()
        plain = make_loss_sum(model, "bf16", DEVICE, compile=False)(Batch(idx, targets)).item()
    assert after < 0.98 * whole["loss"].item() * B * T
    assert after == pytest.approx(plain, rel=1e-3)


def test_two_streams_change_nothing():
    """The order of additions to the embedding is not fixed, so it is left out."""
    from regpt.kernels import triton_ops
    from regpt.kernels.attention import CudnnAttention
    from regpt.kernels.cublaslt import Products
    from regpt.kernels.gpt2 import FusedGPT2

    model, products, attention = build(), Products(DEVICE, tune=False), CudnnAttention(DEVICE, deterministic=True)
    found = []
    for overlap in (True, False):
        path = FusedGPT2(model, products, attention, triton_ops, overlap=overlap)
        found.append(gradients(model, lambda batch, path=path: path.loss_sum(*batch[:4])))
    for name, gradient in found[0].items():
        assert name.startswith("w") or torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_graphs_compute_what_they_were_captured_from(config, masked):
    """Micro-batches, updates and validation, three times over; the embedding's additions have no fixed order."""
    from regpt.kernels import triton_ops
    from regpt.kernels.attention import CudnnAttention
    from regpt.kernels.cublaslt import Products
    from regpt.kernels.gpt2 import FusedGPT2
    from regpt.kernels.graphs import GraphedLoss
    from regpt.kernels.llama import FusedLlama

    given = documents() if masked else {}
    products, attention = Products(DEVICE, tune=False), CudnnAttention(DEVICE, deterministic=True)
    found = []
    for graphs in (True, False):
        model = build(config)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        fused = (FusedLlama if config is LLAMA else FusedGPT2)(model, products, attention, triton_ops)
        path = GraphedLoss(fused) if graphs else fused
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # its update is linear: no difference grows
        losses = []
        for step in range(6):
            optimizer.zero_grad(set_to_none=False)
            for micro in range(2):
                loss = path.loss_sum(*tokens(2 * step + micro), **given) / (2 * B * T)
                loss.backward()
                losses.append(loss.detach())
            with torch.no_grad():
                losses.append(path.loss_sum(*tokens(99), **given))
            if step < 5:
                optimizer.step()
        if graphs:
            assert len(path.steps) == 2
            assert path.captures_left == 14
        found.append({"losses": torch.stack(losses)} | {name: p.grad.clone() for name, p in model.named_parameters()})
    for name, value in found[0].items():
        assert ((value - found[1][name]).norm() / found[1][name].norm()).item() < 2e-3, name


def test_a_capture_that_fails_leaves_a_path_that_works(monkeypatch):
    from regpt.kernels import triton_ops

    model, kept = build(), []
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss_sum = fused_loss(model, DEVICE)
    loss_sum(*tokens()).backward()
    expected = model.h[0].mlp.c_fc.weight.grad.clone()

    def fail(dx, *_):
        kept.append(weakref.ref(dx))
        torch.cuda.synchronize()  # not allowed in a capture

    with monkeypatch.context() as patch:
        patch.setattr(triton_ops, "embed_backward", fail)
        with pytest.warns(RuntimeWarning, match="could not be captured.*not permitted"):
            loss = loss_sum(*tokens())
    assert kept[0]() is None, "the memory of the broken capture is still held"
    assert torch.randn(3, device=DEVICE).isfinite().all(), "sampling goes on"
    loss.backward()
    loss_sum(*tokens()).backward()
    assert ((model.h[0].mlp.c_fc.weight.grad / 3 - expected).norm() / expected.norm()).item() < 1e-3


def test_what_a_graph_holds_is_given_back_when_the_rows_change():
    model = build()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss_sum = fused_loss(model, DEVICE)
    idx, targets = tokens()
    for rows in (6, 6, 6, 2, 2, 2):
        loss_sum(idx[:rows], targets[:rows]).backward()
        torch.cuda.empty_cache()
        if rows == 6:
            most = torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() < most


@pytest.mark.parametrize("epilogue", ["none", "bias", "gelu_aux_bias", "dgelu"])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, False), (False, True), (True, False)])
def test_products(epilogue, transpose_a, transpose_b):
    from regpt.kernels.cublaslt import Products

    M, N, K = 96, 160, 224
    a = torch.randn(*((K, M) if transpose_a else (M, K)), device=DEVICE).bfloat16()
    b = torch.randn(*((N, K) if transpose_b else (K, N)), device=DEVICE).bfloat16()
    options = {"transpose_a": transpose_a, "transpose_b": transpose_b, "epilogue": epilogue}
    options["bias"] = torch.randn(N, device=DEVICE).bfloat16() if "bias" in epilogue else None
    options["add"] = torch.randn(M, N, device=DEVICE).bfloat16() if epilogue in ("none", "bias") else None
    aux = [torch.randn(M, N, device=DEVICE).bfloat16() for _ in range(1)] * 2 if "gelu" in epilogue else [None, None]
    given, expected = (torch.full((M, N), float("nan"), device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    reference.products(a, b, expected, aux=aux[1].clone() if aux[1] is not None else None, **options)
    Products(DEVICE)(a, b, given, aux=aux[0], **options)
    assert ((given.float() - expected.float()).norm() / expected.float().norm()).item() < 4e-3


def test_an_algorithm_found_by_another_process_is_taken_and_a_damaged_one_is_not(tmp_path: Path):
    from regpt.kernels.cublaslt import Products, Tuned, tuned_on

    def folder(name: str) -> Kept:
        return Kept(tmp_path / name)

    a, b = (torch.randn(512, 512, device=DEVICE).bfloat16() for _ in range(2))
    found = []
    for damage in (None, None, b"short", b"\xff" * 96):
        for path in tmp_path.glob("*/*") if damage else ():
            path.write_bytes(damage)
        products = Products(DEVICE, tuned=Tuned(tuned_on(DEVICE).about, folder))
        chosen = []
        choose = products.choose
        products.choose = lambda *given, choose=choose, chosen=chosen: chosen.append(given) or choose(*given)
        out = products(a, b, torch.empty_like(a))
        found.append(len(chosen))
        assert ((out.float() - a.float() @ b.float()).norm() / out.float().norm()).item() < 4e-3
    assert found == [1, 0, 1, 1]
