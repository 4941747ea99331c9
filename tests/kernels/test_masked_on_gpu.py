"""Masks as data as a GPU computes them, against booleans in float64 and against documents that are alone."""

import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from regpt.data.batch import Batch
from regpt.kernels.masked import TorchAttention, attend_in_band, band, cudnn, flash
from regpt.kernels.select import ops_of
from regpt.model import chunked
from regpt.model.chunked import SeenKeys
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.masks import AttentionMask, sdpa_mask
from regpt.model.ops import PLAIN, attention
from regpt.model.weights import initialize, load_weights, state_tensors
from regpt.train.backend import make_loss_sum
from regpt.train.recompute import recompute_blocks

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
B, T = 2, 640
LENGTHS = torch.tensor([5, 123, 257, 255, 1, 639])
HOPPER = pytest.mark.skipif(not find_spec("cudnn"), reason="nvidia-cudnn-frontend is not installed")
KERNELS = [pytest.param(cudnn, id="cudnn", marks=HOPPER), pytest.param(flash, id="flash")]
MASKS = {"documents": (True, None), "window": (False, 100), "both": (True, 100), "one": (True, 1)}


@pytest.fixture(scope="module", autouse=True)
def _context_of_autograd():
    """The first product of autograd's thread warns that it makes the device's context current."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
        (x @ x).sum().backward()


def documents() -> torch.Tensor:
    """Padded with empty ones to a power of two."""
    return F.pad(F.pad(LENGTHS.cumsum(0), (1, 0)), (0, 2), value=B * T).to(DEVICE)


def results(attend, mask, inputs: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [y.clone().requires_grad_() for y in inputs]
    out = attend(*leaves, mask)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def error(given: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative; where one key is all that is seen, gradients of q and k are zero, and what counts is absolute."""
    scale = exact.double().norm().clamp(min=1e-2 * exact.numel() ** 0.5)
    return ((given.double() - exact.double()).norm() / scale).item()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 64), (6, 1, 128), (3, 3, 40)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_as_exact_as_those_with_booleans(kernel, heads, name: str):
    packed, window = MASKS[name]
    mask = AttentionMask(window=window, documents=documents() if packed else None)
    torch.manual_seed(0)
    H, G, D = heads
    *inputs, dout = (torch.randn(B, n, T, D, device=DEVICE).bfloat16() for n in (H, G, G, H))
    seen = sdpa_mask(mask, B, T, T, DEVICE)
    exact = results(attention, seen, [y.double() for y in inputs], dout.double())
    plain = results(attention, seen, inputs, dout)
    given = results(partial(attend_in_band, attend=kernel), band(mask, B, T, T, DEVICE), inputs, dout)
    errors = [(error(ours, true), error(theirs, true)) for ours, theirs, true in zip(given, plain, exact)]
    said = ", ".join(f"{ours:.1e} ({theirs:.1e})" for ours, theirs in errors)
    assert all(ours < max(1.6 * theirs, 4e-3) for ours, theirs in errors), f"out, dq, dk, dv: {said}"


CONFIG = ModelConfig(
    family="qwen3", n_layer=2, n_head=4, n_kv_head=2, n_embd=256, head_size=64, n_inner=512, vocab_size=500,
    max_seq_len=T, window=200,
)  # fmt: skip


def step(model, batch: Batch, precision: str, compile: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = make_loss_sum(model, precision, DEVICE, compile)(batch) / (B * T)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def batch() -> Batch:
    ids = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in LENGTHS.tolist()]).view(B, T).to(DEVICE)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, documents())


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
def test_a_step_of_a_model_is_as_exact_as_with_booleans(compile: bool, recompute: bool):
    plain = initialize(make_model(CONFIG).to(DEVICE), 0)
    model = load_weights(make_model(CONFIG, ops_of("bf16", DEVICE)).to(DEVICE), state_tensors(plain))
    assert model.ops.translate_mask is band
    exact = step(plain, batch(), "fp32", False)
    bound = step(plain, batch(), "bf16", False)
    given = step(recompute_blocks(model) if recompute else model, batch(), "bf16", compile)
    for name, true in exact.items():
        assert error(given[name], true) < max(1.6 * error(bound[name], true), 1e-4), name


def test_each_document_is_computed_as_if_it_were_alone():
    model = initialize(make_model(CONFIG, ops_of("bf16", DEVICE)).to(DEVICE), 0)
    together = batch()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        packed = model.hidden(together.idx, positions=together.positions, cu_seqlens=together.cu_seqlens).flatten(0, 1)
        alone = [model.hidden(part[None])[0] for part in together.idx.flatten().split(LENGTHS.tolist())]
    assert error(packed, torch.cat(alone)) < 5e-3


def test_another_number_of_documents_does_not_compile_again():
    """The counts of a real loader: powers of two; the graphs of cuDNN are built anew, the compiled code is not."""
    model = initialize(make_model(CONFIG, ops_of("bf16", DEVICE)).to(DEVICE), 0)
    loss_sum = make_loss_sum(model, "bf16", DEVICE, True)
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters["stats"]
    losses, compiled = [], []
    for pad in (0, 8, 24, 56):
        one = batch()
        cuts = F.pad(one.cu_seqlens, (0, pad), value=B * T)
        losses.append(loss_sum(one._replace(cu_seqlens=cuts)).item())
        compiled.append(counters["unique_graphs"])
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-4)
    assert compiled[1] == compiled[-1]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_deterministic_algorithms_repeat_bitwise():
    mask = AttentionMask(window=100, documents=documents())
    torch.manual_seed(0)
    *inputs, dout = (torch.randn(B, n, T, 64, device=DEVICE).bfloat16() for n in (8, 2, 2, 8))
    torch.use_deterministic_algorithms(True)
    try:
        attend = partial(attend_in_band, attend=cudnn)
        first, again = (results(attend, band(mask, B, T, T, DEVICE), inputs, dout) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_memory_grows_with_the_length_and_not_with_its_square():
    """A model with rows of 16,384 tokens, with kernels and without: B·T² booleans would be 0.5 GiB, twice over
    in bfloat16."""
    long = replace(CONFIG, max_seq_len=16384, window=4096)
    peaks = {}
    for name, ops in (("data", ops_of("bf16", DEVICE)), ("plain", PLAIN)):
        model = initialize(make_model(long, ops).to(DEVICE), 0)
        idx = torch.zeros(2, 16384, dtype=torch.long, device=DEVICE)
        positions = torch.arange(16384, device=DEVICE).remainder(1024).expand(2, -1)
        cuts = torch.arange(0, 2 * 16384 + 1, 1024, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            model.hidden(idx, positions=positions, cu_seqlens=cuts)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del model
    assert max(peaks.values()) < 0.4 * 2**30 < 2 * 16384**2


# ---- the plain operation in chunks: what the kernels do not have


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 64)], ids=str)
@pytest.mark.parametrize("name", [*MASKS, "tree"])
def test_float32_and_float64_are_computed_in_chunks_with_the_results_of_booleans(
    monkeypatch, dtype: torch.dtype, bound: float, heads, name: str
):
    monkeypatch.setattr(chunked, "BOOLEANS", 0)
    packed, window = MASKS.get(name, (False, None))
    tree = torch.where(torch.arange(T) < T - 90, T, torch.arange(T) // 9 * 9 + 9).expand(B, T).to(DEVICE)
    mask = AttentionMask(
        window=window, documents=documents() if packed else None, tree=tree.contiguous() if name == "tree" else None
    )
    torch.manual_seed(0)
    H, G, D = heads
    *inputs, dout = (torch.randn(B, n, T, D, device=DEVICE, dtype=dtype) for n in (H, G, G, H))
    bounds = band(mask, B, T, T, DEVICE)
    if name == "tree":
        assert isinstance(bounds, SeenKeys)
    exact = results(attention, sdpa_mask(mask, B, T, T, DEVICE), [y.double() for y in inputs], dout.double())
    given = results(partial(attend_in_band, attend=flash), bounds, inputs, dout)
    errors = [error(ours, true) for ours, true in zip(given, exact)]
    assert max(errors) < bound, ", ".join(f"{one:.1e}" for one in errors)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_a_step_in_float32_is_that_with_booleans(monkeypatch, compile: bool, recompute: bool):
    torch.compiler.reset()
    plain = initialize(make_model(CONFIG).to(DEVICE), 0)
    model = load_weights(make_model(CONFIG, ops_of("fp32", DEVICE)).to(DEVICE), state_tensors(plain))
    exact = step(plain, batch(), "fp32", False)
    monkeypatch.setattr(chunked, "BOOLEANS", 0)
    given = step(recompute_blocks(model) if recompute else model, batch(), "fp32", compile)
    for name, true in exact.items():
        assert error(given[name], true) < 1e-5, name


def test_memory_in_float32_grows_with_the_length_and_not_with_its_square():
    """Forward and backward in rows of 16,384 tokens: B·T² booleans would be 0.5 GiB, scores of them 2 GiB a head."""
    long = replace(CONFIG, n_layer=1, max_seq_len=16384, window=4096)
    model = initialize(make_model(long, ops_of("fp32", DEVICE)).to(DEVICE), 0)
    idx = torch.zeros(2, 16384, dtype=torch.long, device=DEVICE)
    positions = torch.arange(16384, device=DEVICE).remainder(1024).expand(2, -1)
    cuts = torch.arange(0, 2 * 16384 + 1, 1024, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.hidden(idx, positions=positions, cu_seqlens=cuts).sum().backward()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert extra < 2.5, f"{extra:.2f} GiB"


@pytest.mark.parametrize("name", ["documents", "window", "both"])
def test_the_packed_product_takes_masks_as_data_through_torch(name: str):
    packed, window = MASKS[name]
    mask = AttentionMask(window=window, documents=documents() if packed else None)
    torch.manual_seed(0)
    qkv, dout = (torch.randn(B, T, n * 4 * 64, device=DEVICE).bfloat16() for n in (3, 1))
    ours = TorchAttention()
    out, stats = ours.forward(qkv, (4, 4), mask)
    exact = qkv.double().requires_grad_()
    q, k, v = (y.view(B, T, 4, 64).transpose(1, 2) for y in exact.chunk(3, dim=-1))
    true = attention(q, k, v, sdpa_mask(mask, B, T, T, DEVICE)).transpose(1, 2).flatten(2)
    assert error(out, true) < 6e-3
    true_gradient = torch.autograd.grad(true, exact, dout.double())[0]
    assert error(ours.backward(dout, qkv, out, stats, (4, 4), mask), true_gradient) < 6e-3
