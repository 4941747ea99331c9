"""Keys and their numbers against a dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.prepare.dedup import SortedIndex

CALLS = st.lists(st.lists(st.integers(0, 12), max_size=20), max_size=12)


@pytest.mark.parametrize("dtype", ["<u8", "S16"])
@given(calls=CALLS)
@settings(deadline=None, max_examples=60)
def test_a_key_has_the_numbers_that_it_was_given(dtype, calls):
    index, known, total = SortedIndex(dtype), {}, 0
    for numbers in calls:
        keys = as_keys(numbers, dtype)
        index.add(keys, np.arange(total, total + len(keys)))
        for number in numbers:
            known.setdefault(number, []).append(total)
            total += 1
        asked = [3, 5, 3, *range(8)]
        positions, found = index.find(as_keys(asked, dtype), limit=1000)
        for i, number in enumerate(asked):
            assert sorted(found[positions == i].tolist()) == known.get(number, [])


def as_keys(numbers: list[int], dtype: str) -> np.ndarray:
    return np.array([b"%d" % number if dtype == "S16" else number for number in numbers], dtype=dtype)


def test_the_first_of_many_entries_are_found():
    index = SortedIndex("<u8")
    index.add(np.full(100, 7, dtype="<u8"), np.arange(100))
    positions, numbers = index.find(np.array([6, 7, 8], dtype="<u8"), limit=3)
    assert (positions.tolist(), numbers.tolist()) == ([1, 1, 1], [0, 1, 2])


def test_entries_are_in_few_arrays():
    index = SortedIndex("<u8")
    for i in range(200):
        index.add(np.arange(i * 7, i * 7 + 7, dtype="<u8"), np.arange(7))
    assert len(index._runs) < 12
