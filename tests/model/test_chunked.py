"""Attention in chunks against attention under booleans: values, gradients, compiled steps, trees, memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from plain_cache import KVCache
from regpt.data.batch import Batch
from regpt.evals.packing import Prompt
from regpt.evals.score import Scorer
from regpt.model import chunked
from regpt.model.chunked import SeenKeys, attention_in_chunks, plain_mask
from regpt.model.masks import AttentionMask, sdpa_mask
from regpt.model.ops import attention
from regpt.train.objective import NextToken
from regpt.train.recompute import recompute_blocks

DEVICES = pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "other devices"])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    for name, value in {"BOOLEANS": 0, "CHUNK": 4, "PIECE": 16, "LEAST": 2, "KEY_MULTIPLE": 2}.items():
        monkeypatch.setattr(chunked, name, value)


@pytest.fixture
def on_device(monkeypatch):
    """`on_device(False)`: as on devices other than the CPU."""
    return lambda on_cpu: monkeypatch.setattr(chunked, "has_kernels", lambda device: on_cpu)


def results(mask, inputs: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [y.clone().requires_grad_() for y in inputs]
    out = attention(*leaves, mask)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@DEVICES
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 3), st.integers(1, 14), st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]))
def test_outputs_and_gradients_are_those_of_the_boolean_mask(on_device, on_cpu, data, B: int, T: int, heads):
    on_device(on_cpu)
    packing = data.draw(st.sampled_from(["", "documents", "tree"]))
    window = data.draw(st.none() | st.integers(1, 9))
    cuts = data.draw(st.lists(st.integers(0, B * T), max_size=6).map(sorted))  # across rows, and empty ones
    ends = [[data.draw(st.integers(j + 1, T)) for j in range(T)] for _ in range(B)] if packing == "tree" else []
    mask = AttentionMask(
        window=window,
        documents=torch.tensor([0, *cuts, B * T], dtype=torch.int32) if packing == "documents" else None,
        tree=torch.tensor(ends) if packing == "tree" else None,
    )
    S = T + (data.draw(st.integers(0, 9)) if not packing else 0)  # a cache
    draw = torch.Generator().manual_seed(0)
    H, G = heads
    sizes = (H, T), (G, S), (G, S), (H, T)
    *inputs, dout = (torch.randn(B, n, length, 8, generator=draw, dtype=torch.float64) for n, length in sizes)
    bounds = plain_mask(mask, B, T, S, tiny.CPU)
    assert isinstance(bounds, SeenKeys) == (packing != "" or (window or S) < S or T not in (1, S))
    expected = results(sdpa_mask(mask, B, T, S, tiny.CPU), inputs, dout)
    for ours, exact in zip(results(bounds, inputs, dout), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_few_booleans_stay_one_tensor(monkeypatch):
    monkeypatch.setattr(chunked, "BOOLEANS", 2 * 8 * 8)
    documents = AttentionMask(documents=torch.tensor([0, 5, 16]))
    assert torch.equal(plain_mask(documents, 2, 8, 8, tiny.CPU), sdpa_mask(documents, 2, 8, 8, tiny.CPU))
    assert isinstance(plain_mask(AttentionMask(documents=torch.tensor([0, 5, 18])), 2, 9, 9, tiny.CPU), SeenKeys)
    assert isinstance(plain_mask(AttentionMask(window=3), 2, 9, 9, tiny.CPU), torch.Tensor)  # T² of them


# ---- through the model

WINDOWED = replace(tiny.FAMILY_CONFIGS["mistral"], n_head=6, n_kv_head=2, head_size=8, window=4)


def batch() -> Batch:
    lengths = torch.tensor([12, 5, 7, 1, 11, 12, 6, 6, 12, 3, 9, 12])
    cuts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).view(tiny.N_ROWS, tiny.SEQ_LEN)
    return Batch(*tiny.Rows().rows(0), positions=positions, cu_seqlens=cuts)


def step(model, loss_sum) -> dict[str, torch.Tensor]:
    loss = loss_sum(batch())[0]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_booleans(monkeypatch, compute):
    with monkeypatch.context() as patch:
        patch.setattr(chunked, "BOOLEANS", 2**23)
        return compute()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=tiny.IMPORTS_COMPILER)], ids=["", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@DEVICES
def test_a_step_is_the_same_compiled_and_with_activation_checkpointing(
    monkeypatch, on_device, on_cpu: bool, family: str, recompute: bool, compile: bool
):
    config = WINDOWED if family == "mistral" else tiny.FAMILY_CONFIGS[family]
    exact = tiny.build_model(config=config)
    expected = with_booleans(monkeypatch, lambda: step(exact, NextToken(exact).loss_sum))
    on_device(on_cpu)
    model = tiny.build_model(config=config)
    if recompute:
        recompute_blocks(model)
    loss_sum = NextToken(model).loss_sum
    if compile:
        torch.compiler.reset()  # cases before have filled the cache of this function
        loss_sum = torch.compile(loss_sum, backend="aot_eager", dynamic=False, fullgraph=True)
    for name, value in step(model, loss_sum).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@torch.no_grad()
def test_a_long_prompt_after_a_cache_sees_what_booleans_show(monkeypatch):
    model = tiny.build_model(config=WINDOWED)
    idx = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = with_booleans(monkeypatch, lambda: model.hidden(idx))
    cache = KVCache(WINDOWED, 2, 12, device=tiny.CPU, dtype=torch.float64)
    parts = [model.hidden(part, cache=cache) for part in idx.split([5, 6, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


@DEVICES
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=tiny.IMPORTS_COMPILER)], ids=["", "compiled"])
def test_endings_of_prompts_score_the_same(monkeypatch, on_device, on_cpu: bool, compile: bool):
    """Trees of several endings, as a needle's prompts are."""
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiler(f, backend="aot_eager", **kwargs))
    draw = torch.Generator().manual_seed(3)
    tokens = lambda n: torch.randint(97, (n,), generator=draw).numpy()  # noqa: E731
    prompts = [Prompt(tokens(9), [tokens(2), tokens(3)], [2, 3]), Prompt(tokens(3), [tokens(1)] * 4, [1] * 4)]
    model = tiny.build_model(config=WINDOWED).eval()
    score = lambda: Scorer(model, tiny.ALONE, compile=compile, batch_tokens=48)(prompts)  # noqa: E731
    expected = with_booleans(monkeypatch, score)
    on_device(on_cpu)
    found = score()
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    assert found.greedy.tolist() == expected.greedy.tolist()


compiler = torch.compile


@DEVICES
def test_under_autocast_queries_of_float32_are_rounded_as_torch_rounds_them(on_device, on_cpu: bool):
    """Norms of q and k give float32 there, projections of v bfloat16."""
    on_device(on_cpu)
    mask = AttentionMask(window=6)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 3, 16, 8) for _ in range(4))
    inputs = [q, k, v.bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(sdpa_mask(mask, 2, 16, 16, tiny.CPU), inputs, dout.bfloat16())
        found = results(plain_mask(mask, 2, 16, 16, tiny.CPU), inputs, dout.bfloat16())
    for ours, theirs, like in zip(found, expected, [v.bfloat16(), *inputs]):
        assert ours.dtype == theirs.dtype == (torch.bfloat16 if like is inputs[2] or ours is found[0] else like.dtype)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2)


# ---- memory


class Largest(TorchDispatchMode):
    """Elements of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for one in results if isinstance(results, tuple | list) else (results,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return results


@DEVICES
@pytest.mark.parametrize("kind", ["documents", "window", "tree"])
def test_no_operation_makes_a_tensor_of_rows_times_length_squared(monkeypatch, on_device, on_cpu: bool, kind: str):
    on_device(on_cpu)
    monkeypatch.setattr(chunked, "CHUNK", 32)
    B, T, D = 2, 1024, 8
    kinds = {
        "documents": AttentionMask(documents=torch.arange(0, B * T + 1, T // 2)),
        "window": AttentionMask(window=700),
        "tree": AttentionMask(tree=torch.full((B, T), T)),
    }
    q = torch.zeros(B, 1, T, D)
    with Largest() as largest:
        bounds = plain_mask(kinds[kind], B, T, T, tiny.CPU)
        assert isinstance(bounds, SeenKeys)
        out, stats = chunked.forward(q, q, q, *bounds)
        chunked.backward(out, q, q, q, out, stats, *bounds)
    assert largest.elements <= 32 * B * T
    assert attention_in_chunks(q, q, q, bounds).shape == q.shape


def test_a_chunk_reads_the_keys_that_its_queries_see_and_no_others():
    """Documents of 8 tokens: chunks of 4 queries read at most 8 keys; a window of 3 at most 6, and one to the left for
    whole vectors."""
    documents = AttentionMask(documents=torch.arange(0, 33, 8))
    for mask, most in ((documents, 8), (AttentionMask(window=3), 7)):
        bounds = plain_mask(mask, 1, 32, 32, tiny.CPU)
        assert isinstance(bounds, SeenKeys)
        read = [keys.stop - keys.start for _, keys, _ in chunked.chunks(bounds, 32, 32, 4)]
        assert max(read) <= most
        assert len(read) == 8
