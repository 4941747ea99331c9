"""GPT-2's and Llama's fused decode steps against the models themselves: on a GPU, or on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_fused_decode.py`, with numpy below 2.4).
"""

import os
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

import tiny
from regpt.engine.cache import DecodeView, Pages, PrefillView, PromptSpan
from regpt.engine.decode import TABLE, row_state
from regpt.engine.engine import Engine
from regpt.engine.fast import Prefill, half_copy
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request
from regpt.model.ops import attention

triton = pytest.importorskip("triton")
fused = pytest.importorskip("regpt.kernels.gpt2_decode")
llama = pytest.importorskip("regpt.kernels.llama_decode")
prefill_attention = pytest.importorskip("regpt.kernels.paged").prefill_attention
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
CONFIG = replace(tiny.CONFIG, max_seq_len=200)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("position", [0, 17, 300])
def test_a_text_of_llama_is_the_models(family, position):
    """Three query heads a group; sizes that are no powers of two; positions in several blocks of the kernel."""
    sizes = {"n_head": 6, "n_kv_head": 2, "n_embd": 96, "head_size": 16, "n_inner": 80, "max_seq_len": 320}
    config = replace(tiny.FAMILY_CONFIGS[family], **sizes)
    model = tiny.build_model(config=config, dtype=torch.float32).eval().to(DEVICE, DTYPE)
    whole = half_copy(model, torch.float32)
    both = [Pages(config, 30, 16, DEVICE, dtype) for dtype in (DTYPE, torch.float32)]
    for held, exact in zip((both[0].k, both[0].v), (both[1].k, both[1].v)):
        held.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        exact.copy_(held)
    state = row_state(position, 0, SamplingOptions(), torch.randperm(30)[:20].add(1).tolist(), TABLE + 20)[None].to(
        DEVICE
    )
    state[:, 0] = 5
    tables, positions = state[:, TABLE:], state[:, 1]
    found = llama.LlamaDecode(model).hidden(state, tables, both[0].k, both[0].v, 16)
    expected = whole.hidden(state[None, :, 0], positions=positions[None], cache=DecodeView(both[1], tables, positions))[
        0
    ]
    bound = 1e-5 if torch.float32 == DTYPE else 4e-2
    assert (found.float() - expected).norm() < bound * expected.norm()
    assert (both[0].k.float() - both[1].k).norm() < bound * both[1].k.norm()
    assert (both[0].v.float() - both[1].v).norm() < bound * both[1].v.norm()


@torch.no_grad()
@pytest.mark.parametrize("which", [[0, 1, 2], [0], [1]])
def test_hidden_states_and_cache_are_the_models(which):
    model = tiny.build_model(config=CONFIG, dtype=torch.float32).eval().to(DEVICE, DTYPE)
    whole = half_copy(model, torch.float32)  # of the rounded weights
    both = [Pages(CONFIG, 30, 16, DEVICE, dtype) for dtype in (DTYPE, torch.float32)]
    for held, exact in zip((both[0].k, both[0].v), (both[1].k, both[1].v)):
        held.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        exact.copy_(held)
    pages = [[3, 9, 4, 7, 5, 6], [1], [2, 8]]
    rows = [row_state(p, 0, SamplingOptions(), used, TABLE + 8) for p, used in zip((90, 0, 17), pages)]
    state = torch.stack(rows)
    state[:, 0] = torch.tensor([5, 60, 96])
    state = state[which].to(DEVICE)
    tables, positions = state[:, TABLE:], state[:, 1]
    found = fused.FusedDecode(model).hidden(state, tables, both[0].k, both[0].v, 16)
    view = DecodeView(both[1], tables, positions)
    expected = whole.hidden(state[None, :, 0], positions=positions[None], cache=view)[0]
    bound = 2e-3 if torch.float32 == DTYPE else 4e-2  # the CPU's GELU is that of erf
    assert (found.float() - expected).norm() < bound * expected.norm()
    assert (both[0].k.float() - both[1].k).norm() < bound * both[1].k.norm()
    assert (both[0].v.float() - both[1].v).norm() < bound * both[1].v.norm()


def by_torch(q, k, v, lengths, longest, window):
    """In the place of FlashAttention, which a CPU does not have."""
    found = torch.empty_like(q)
    for (a, b), (c, d) in zip(pairwise(lengths[0].tolist()), pairwise(lengths[1].tolist())):
        found[:, :, a:b] = attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d])
    return found


@torch.no_grad()
@pytest.mark.parametrize("starts", [(0, 0), (0, 20)])
def test_prompts_are_read_as_by_the_model(starts):
    model = tiny.build_model(config=CONFIG, dtype=torch.float32).eval().to(DEVICE, DTYPE)
    whole = half_copy(model, torch.float32)
    both = [Pages(CONFIG, 30, 16, DEVICE, dtype) for dtype in (DTYPE, torch.float32)]
    for held, exact in zip((both[0].k, both[0].v), (both[1].k, both[1].v)):
        held.normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        exact.copy_(held)
    spans = [PromptSpan(0, 18, starts[0], [3, 9, 4]), PromptSpan(18, 5, starts[1], [7, 8], 7 * 16)]
    positions = [*range(starts[0], starts[0] + 18), *range(starts[1], starts[1] + 5)]
    given = torch.tensor([[i * 7 % 97 for i in range(23)], positions], device=DEVICE)
    kernel = by_torch if DEVICE.type == "cpu" else prefill_attention
    found = Prefill(model, fused.FusedDecode(model), both[0], graphs=False)(given, PrefillView(both[0], spans, kernel))
    expected = whole.hidden(given[:1], positions=given[1:], cache=PrefillView(both[1], spans))[0]
    bound = 2e-3 if torch.float32 == DTYPE else 4e-2
    assert (found.float() - expected).norm() < bound * expected.norm()
    assert (both[0].k.float() - both[1].k).norm() < bound * both[1].k.norm()
    assert (both[0].v.float() - both[1].v).norm() < bound * both[1].v.norm()


@torch.no_grad()
@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("lengths", [[1], [23], [16], [40, 3, 3], [33, 64, 1, 1], [17] * 5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_read_by_a_graph_are_those_without(family, lengths):
    config = CONFIG if family == "gpt2" else replace(tiny.FAMILY_CONFIGS[family], head_size=8, max_seq_len=200)
    model = tiny.build_model(config=config, dtype=torch.float32).eval().to(DEVICE, DTYPE)
    step = fused.FusedDecode(model) if family == "gpt2" else None
    both = [Pages(config, 60, 16, DEVICE, DTYPE) for _ in range(2)]
    paths = [Prefill(model, step, pages, graphs=graphs) for pages, graphs in zip(both, (True, False))]
    ends = [0, *accumulate(lengths)]
    for seed in range(3):  # the first without a graph, the last with it for the second time
        idx = torch.randint(97, (ends[-1],), generator=torch.Generator().manual_seed(seed))
        given = torch.stack((idx, torch.cat([torch.arange(n) for n in lengths]))).to(DEVICE)
        spans = [
            PromptSpan(a, n, 0, [1 + 9 * i + (j + seed) % 9 for j in range(9)])
            for i, (a, n) in enumerate(zip(ends, lengths))
        ]
        found, expected = (path(given, PrefillView(path.pages, spans, prefill_attention)) for path in paths)
        assert torch.equal(found, expected) or (found - expected).float().norm() < 4e-3 * expected.float().norm()
        assert len(paths[0].captured) == min(seed, 1)
        held, plain = (torch.stack((pages.k, pages.v))[..., 16:, :].float() for pages in both)
        assert (held - plain).norm() < 4e-3 * plain.norm()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
@pytest.mark.parametrize("graphs", [False, True])
def test_texts_by_kernels_are_those_without_but_for_rounding(graphs):
    model = half_copy(tiny.build_model(config=CONFIG, dtype=torch.float32).to(DEVICE), torch.bfloat16)
    given = [Request([i, 5, i], 20 + i, SamplingOptions(1.0, 0 if i % 4 == 3 else 8), i) for i in range(40)]
    plain = Engine(model, max_rows=16, graphs=False, kernels=False).run(given)
    found = Engine(model, max_rows=16, graphs=graphs).run(given)
    assert Engine(model, max_rows=16, graphs=graphs).run(given) == found
    firsts = [a[0][0] == b[0][0] for a, b in zip(plain, found)]
    assert sum(firsts) >= 36


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs")
def test_float32_texts_are_the_same_with_graphs_and_on_the_cpu():
    torch.set_float32_matmul_precision("highest")
    model = tiny.build_model(config=CONFIG, dtype=torch.float32).eval()
    given = [Request([i, 5], 20 + i, SamplingOptions(1.0, 8 * (i % 3)), i) for i in range(30)]
    expected = Engine(model, max_rows=8).run(given)
    model = model.to(DEVICE)
    assert Engine(model, max_rows=8).run(given) == expected
    assert Engine(model, max_rows=3, graphs=False, kernels=False, page_size=4).run(given) == expected
