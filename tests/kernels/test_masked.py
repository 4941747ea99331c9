"""Masks as data against booleans: the translation, its kernels emulated on a CPU, and the choice between them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from kernels.emulated import emulated
from plain_cache import KVCache
from regpt.data.batch import Batch
from regpt.kernels import masked
from regpt.kernels.masked import Band, attend_in_band, band, cudnn, flash, with_masks_as_data
from regpt.kernels.select import ops_of
from regpt.model.families import make_model
from regpt.model.masks import AttentionMask, sdpa_mask
from regpt.model.ops import PLAIN, Ops, attention
from regpt.model.weights import load_weights, state_tensors
from regpt.train.objective import NextToken
from regpt.train.recompute import recompute_blocks

KERNELS = pytest.mark.parametrize("kernel", [cudnn, flash], ids=["cudnn", "flash"])


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    with emulated(monkeypatch):
        yield


def ops_with(kernel) -> Ops:
    return replace(PLAIN, attention=partial(attend_in_band, attend=kernel), translate_mask=band)


@KERNELS
@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.sampled_from([(1, 1), (4, 1), (4, 2)]))
def test_outputs_and_gradients_are_those_of_the_boolean_mask(kernel, data, B: int, T: int, heads: tuple[int, int]):
    cuts = data.draw(st.none() | st.lists(st.integers(0, B * T), max_size=6).map(sorted))  # across rows, and empty ones
    documents = None if cuts is None else torch.tensor([0, *cuts, B * T])
    mask = AttentionMask(window=data.draw(st.none() | st.integers(1, 8)), documents=documents)
    draw = torch.Generator().manual_seed(0)
    H, G = heads
    q, k, v, dout = (torch.randn(B, n, T, 8, generator=draw, dtype=torch.float64) for n in (H, G, G, H))
    found = []
    for attend, translate in ((partial(attend_in_band, attend=kernel), band), (attention, sdpa_mask)):
        leaves = [y.clone().requires_grad_() for y in (q, k, v)]
        out = attend(*leaves, translate(mask, B, T, T, tiny.CPU))
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


# ---- through the model


def packed() -> dict[str, torch.Tensor]:
    """Eight rows of documents, padded with empty ones to a power of two."""
    lengths = torch.tensor([12, 5, 7, 1, 11, 12, 6, 6, 12, 3, 9, 12])
    cuts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).view(tiny.N_ROWS, tiny.SEQ_LEN)
    return {"positions": positions, "cu_seqlens": torch.cat([cuts, cuts[-1:].expand(17 - len(cuts))])}


def found_by(model, loss_sum=None, **given) -> dict[str, torch.Tensor]:
    batch = Batch(*tiny.Rows().rows(0), **given)
    loss = (loss_sum or NextToken(model).loss_sum)(batch)[0]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def like(model, ops: Ops):
    return load_weights(make_model(model.config, ops).double(), state_tensors(model))


def assert_same(found: dict, exact: dict) -> None:
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


WINDOWED = replace(tiny.FAMILY_CONFIGS["mistral"], n_head=6, n_kv_head=2, head_size=8, window=4)


@KERNELS
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=tiny.IMPORTS_COMPILER)], ids=["", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_a_step_is_the_same_compiled_and_with_activation_checkpointing(kernel, compile: bool, recompute: bool):
    exact = tiny.build_model(config=WINDOWED)
    model = like(exact, ops_with(kernel))
    if recompute:
        recompute_blocks(model)
    loss_sum = NextToken(model).loss_sum
    if compile:
        loss_sum = torch.compile(loss_sum, backend="aot_eager", dynamic=False)
    assert_same(found_by(model, loss_sum, **packed()), found_by(exact, **packed()))


def test_with_dropout_the_mask_stays_boolean():
    exact = tiny.build_model(config=replace(WINDOWED, dropout=0.3))
    given = packed() | {"dropout_keys": torch.arange(tiny.N_ROWS)}
    assert_same(found_by(like(exact, ops_with(flash)), **given), found_by(exact, **given))


@KERNELS
@torch.no_grad()
def test_a_cache_and_a_tree_have_what_booleans_give(kernel):
    exact = tiny.build_model(config=WINDOWED)
    model = like(exact, ops_with(kernel))
    idx = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(WINDOWED, 2, 12, device=tiny.CPU, dtype=torch.float64)
    parts = [model.hidden(part, cache=cache) for part in idx.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), exact.hidden(idx), rtol=1e-12, atol=1e-12)
    positions, tree = torch.arange(12).expand(2, 12), AttentionMask(tree=torch.full((2, 12), 9))
    given = {"positions": positions, "mask": tree}
    torch.testing.assert_close(model.hidden(idx, **given), exact.hidden(idx, **given), rtol=1e-12, atol=1e-12)


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


@KERNELS
@pytest.mark.parametrize("masks", ["documents", "window", "both"])
def test_no_operation_outside_the_kernels_makes_a_tensor_of_rows_times_length_squared(monkeypatch, kernel, masks: str):
    """The emulation makes such tensors itself; in its place stands a product."""
    monkeypatch.setattr(masked, "cudnn", lambda q, k, v, documents, window: q * v.sum())
    monkeypatch.setattr(masked, "flash", lambda q, k, v, documents, window: q * v.sum())
    B, T = 2, 512
    config = replace(WINDOWED, max_seq_len=T, n_kv_head=6, window=0 if masks == "documents" else 4)
    positions = torch.arange(T).remainder(T // 2).expand(B, T)
    idx, given = torch.zeros(B, T, dtype=torch.long), {}
    if masks != "window":
        given = {"positions": positions, "cu_seqlens": torch.arange(0, B * T + 1, T // 2)}
    elements = []
    for ops in (ops_with(getattr(masked, kernel.__name__)), PLAIN):
        model = tiny.build_model(config=config)
        model = load_weights(make_model(config, ops).double(), state_tensors(model))
        with Largest() as largest:
            model.hidden(idx, **given).sum().backward()
        elements.append(largest.elements)
    assert elements[0] < T * T <= elements[1]


# ---- the choice


@pytest.fixture
def gpu(monkeypatch):
    """`gpu((9, 0), "cudnn")`: a machine that says it has a GPU of this compute capability, and these packages."""

    def machine(capability: tuple[int, int], *packages: str) -> torch.device:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(masked, "find_spec", lambda name: name in packages)
        return torch.device("cuda")

    return machine


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [((9, 0), ["cudnn"], cudnn), ((9, 0), [], flash), ((8, 0), ["cudnn"], flash), ((10, 0), ["cudnn"], cudnn)],
)
def test_a_gpu_gets_the_kernel_that_it_has(gpu, capability, packages, expected):
    ops = ops_of("bf16", gpu(capability, *packages))
    assert ops.translate_mask is band
    assert ops.attention.keywords == {"attend": expected}  # pyright: ignore[reportFunctionMemberAccess]


def test_other_devices_and_precisions_keep_the_plain_operation(gpu, monkeypatch):
    assert ops_of("bf16", gpu((7, 5), "cudnn")) is PLAIN
    assert ops_of("fp32", gpu((9, 0), "cudnn")) is PLAIN
    assert ops_of("bf16", tiny.CPU) is PLAIN
    own = replace(PLAIN, attention=lambda q, k, v, mask=None: attention(q, k, v, mask))
    assert with_masks_as_data(own, gpu((9, 0), "cudnn")) is own
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ops_of("bf16", torch.device("cuda")) is PLAIN


@pytest.mark.parametrize(("head_size", "dtype"), [(12, torch.float64), (8, torch.float16)])
def test_what_the_kernels_cannot_have_is_left_to_the_plain_operation(monkeypatch, head_size: int, dtype: torch.dtype):
    monkeypatch.setattr(masked, "HALF", (torch.float64,))
    monkeypatch.setattr(masked, "HEAD_MULTIPLE", 8)

    def refuse(*args):
        raise AssertionError("a kernel was called")

    q, k, v = (torch.randn(2, 3, 5, head_size).to(dtype) for _ in range(3))
    mask = AttentionMask(window=2, documents=torch.tensor([0, 3, 5, 10]))
    given = attend_in_band(q, k, v, band(mask, 2, 5, 5, tiny.CPU), attend=refuse)
    torch.testing.assert_close(given, attention(q, k, v, sdpa_mask(mask, 2, 5, 5, tiny.CPU)))


def test_a_window_as_long_as_the_row_is_no_mask():
    assert band(AttentionMask(window=5), 2, 5, 5, tiny.CPU) is None
    assert band(AttentionMask(window=4), 2, 5, 5, tiny.CPU) == Band(None, 4)


@pytest.mark.parametrize("D", [64, 192])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_leaves_large_heads_and_deterministic_algorithms_to_flash(monkeypatch, D: int, deterministic: bool):
    called = []
    monkeypatch.setattr(masked, "flash", lambda q, *rest: called.append("flash") or q)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q = torch.randn(1, 4, 1, D, dtype=torch.float64)
    cudnn(q, q, q, None, 2)
    assert bool(called) == (deterministic or D > 128)
