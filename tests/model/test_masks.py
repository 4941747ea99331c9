"""Masks as data against naive ones, pair by pair, and through the model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from plain_cache import KVCache
from regpt.errors import UserError
from regpt.kernels.attention import cudnn_documents
from regpt.kernels.masked import TorchAttention
from regpt.model.masks import CAUSAL, AttentionMask, sdpa_mask

T = tiny.CONFIG.max_seq_len
CU = torch.tensor([0, 5, 16, 23, 32])


def naive(mask: AttentionMask, b: int, i: int, j: int, T: int) -> bool:
    """Whether query i of row b sees key j, condition by condition."""
    allowed = [True]
    if mask.causal:
        allowed.append(j <= i)
    if mask.window is not None:
        allowed.append(abs(i - j) < mask.window)
    if mask.documents is not None:
        cuts = mask.documents.tolist()
        allowed.append(all((cut <= b * T + i) == (cut <= b * T + j) for cut in cuts))
    if mask.tree is not None:
        allowed.append(i < int(mask.tree[b, j]))
    return all(allowed)


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_every_combination_of_conditions_is_the_naive_mask(data, B: int, T: int, causal: bool):
    cuts = data.draw(st.none() | st.lists(st.integers(0, B * T), max_size=6).map(sorted))  # empty documents too
    ends = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B * T, max_size=B * T))
    mask = AttentionMask(
        causal,
        data.draw(st.none() | st.integers(1, 8)),
        None if cuts is None else torch.tensor([0, *cuts, B * T]),
        None if ends is None else torch.tensor(ends).view(B, T),
    )
    given = sdpa_mask(mask, B, T, T, tiny.CPU)
    given = torch.ones(T, T, dtype=torch.bool).tril() if given is None else given
    expected = [[[[naive(mask, b, i, j, T) for j in range(T)] for i in range(T)]] for b in range(B)]
    assert given.dtype == torch.bool
    assert given.expand(B, 1, T, T).tolist() == expected


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_a_window_counts_from_the_queries_after_a_cache(window: int, queries: int):
    given = sdpa_mask(AttentionMask(window=window), 1, queries, 5, tiny.CPU)
    if window >= 5:
        assert given is None  # the causal mask, which costs none
    else:
        expected = [[naive(AttentionMask(window=window), 0, i, j, 5) for j in range(5)] for i in range(5 - queries, 5)]
        assert given is not None
        assert given.tolist() == expected


@torch.no_grad()
def test_a_model_with_a_window_forgets_what_lies_before_it_also_through_its_cache():
    config = replace(tiny.CONFIG, n_layer=1)
    model = tiny.build_model(config=config)
    idx = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(1))
    window = AttentionMask(window=4)
    whole = model.hidden(idx, mask=window)
    changed = idx.clone()
    changed[:, 3] = (idx[:, 3] + 1) % 97
    moved = (model.hidden(changed, mask=window) - whole).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [3 <= t < 7 for t in range(T)]
    cache = KVCache(config, 2, T, device=tiny.CPU, dtype=torch.float64)
    parts = [model.hidden(part, cache=cache, mask=window) for part in idx.split([5, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_windows_and_documents_add_up():
    model = tiny.build_model()
    idx = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in CU.diff().tolist()]).view(2, T)
    both = model.hidden(idx, positions=positions, cu_seqlens=CU, mask=AttentionMask(window=3)).flatten(0, 1)
    alone = [
        model.hidden(part[None], mask=AttentionMask(window=3))[0] for part in idx.flatten().split(CU.diff().tolist())
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="window is 0, must be at least 1"):
        AttentionMask(window=0)


@pytest.mark.parametrize(
    "mask", [AttentionMask(causal=False), AttentionMask(window=3), AttentionMask(tree=torch.zeros(1, 4))]
)
def test_cudnn_refuses_in_one_sentence_the_masks_that_its_graphs_do_not_have(mask: AttentionMask):
    with pytest.raises(
        UserError, match=r"computes causal masks and documents, no windows or trees; set train\.kernels"
    ):
        cudnn_documents(mask)


def test_cudnn_takes_whole_rows_and_documents():
    assert cudnn_documents(CAUSAL) is None
    assert cudnn_documents(AttentionMask(documents=CU)) is CU


def test_attention_on_the_packed_product_translates_masks_too():
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, T, 3 * 24, generator=draw, dtype=torch.float64)
    whole = TorchAttention().forward(qkv, (2, 2), AttentionMask(window=4))[0]
    late = TorchAttention().forward(qkv[:, 9:], (2, 2), AttentionMask(window=4))[0]
    torch.testing.assert_close(whole[:, 12:], late[:, 3:], rtol=1e-12, atol=1e-12)
