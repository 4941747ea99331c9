"""Reading a text in pieces behind a cache is reading it at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from plain_cache import KVCache

T = tiny.CONFIG.max_seq_len
MODEL = tiny.build_model()
IDX = torch.randint(tiny.CONFIG.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


def new_cache(batch: int = 2, capacity: int = T) -> KVCache:
    return KVCache(tiny.CONFIG, batch, capacity, device=tiny.CPU, dtype=torch.float64)


@torch.no_grad()
def read(cache: KVCache, ends: list[int]) -> torch.Tensor:
    """Logits (2, T, V) of IDX, read up to each of `ends` in turn."""
    starts = [0, *ends]
    return torch.cat([MODEL(IDX[:, i:j], cache=cache) for i, j in zip(starts, ends)], dim=1)


@settings(deadline=None)  # a busy machine is no defect
@given(st.sets(st.integers(1, T - 1)))
def test_any_split_of_the_sequence_gives_the_logits_of_the_whole(cuts: set[int]):
    cache = new_cache()
    with torch.no_grad():
        expected = MODEL(IDX)
    torch.testing.assert_close(read(cache, [*sorted(cuts), T]), expected, rtol=1e-11, atol=1e-11)
    assert cache.length == T


def test_setting_the_length_back_forgets_what_came_later():
    cache = new_cache()
    expected = read(cache, [5, T])
    cache.length = 5
    with torch.no_grad():
        MODEL(IDX.flip(1)[:, :4], cache=cache)  # another continuation
        cache.length = 5
        torch.testing.assert_close(MODEL(IDX[:, 5:], cache=cache), expected[:, 5:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_more_positions_than_the_cache_or_the_model_has_are_refused():
    cache = new_cache(capacity=4)
    assert cache.capacity == 4
    with pytest.raises(ValueError, match="5 positions do not fit into a cache of 4"):
        MODEL(IDX[:, :5], cache=cache)
    cache = new_cache(capacity=2 * T)
    MODEL(IDX, cache=cache)
    with pytest.raises(ValueError, match=f"{T + 1} tokens given, the model has {T} positions"):
        MODEL(IDX[:, :1], cache=cache)


def test_another_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match="2 sequences do not fit into a cache of 3"):
        MODEL(IDX, cache=new_cache(batch=3))
