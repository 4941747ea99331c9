"""Documents that repeat earlier ones: keys against a dictionary, signatures against every pair."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.prepare import dedup
from regpt.prepare.dedup import (
    BANDS,
    EMPTY,
    NONE,
    PERMUTATIONS,
    ROWS,
    SIGNATURE,
    THRESHOLD,
    ExactDuplicates,
    MinHash,
    NearDuplicates,
)


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12))
@settings(deadline=None, max_examples=100)
def test_the_first_document_with_a_key_is_found(calls):
    index, first, total = ExactDuplicates(), {}, 5
    for keys in calls:
        numbers = np.arange(total, total + 3 * len(keys), 3)
        expected = []
        for key, number in zip(keys, numbers.tolist()):
            known = first.setdefault(key, NONE)
            if known == NONE:
                first[key] = number
            expected.append(known)
        given = np.array([b"%016d" % key for key in keys], dtype="S16")
        assert index.add(given, numbers).tolist() == expected
        total += 3 * len(keys)
    assert sum(len(keys) for keys, _ in index._index._runs) == len(first)


def signature_file(path: Path, values: list[np.ndarray]) -> Path:
    np.array([(2 * i, value) for i, value in enumerate(values)], dtype=SIGNATURE).tofile(path)
    return path


@pytest.mark.parametrize("block", [1, 3, 1000])
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_the_documents_left_out_are_those_that_all_pairs_name(tmp_path_factory, block, seed):
    """Signatures made from four, with 3 to 40 of 128 values changed: two differ in 26 at most if they are near."""
    folder, chosen = tmp_path_factory.mktemp("near"), np.random.default_rng(seed)
    originals = chosen.integers(0, 1 << 32, (4, PERMUTATIONS), dtype=np.uint32)
    values = []
    for _ in range(40):
        value = originals[chosen.integers(4)].copy()
        start = chosen.integers(PERMUTATIONS - 40)
        value[start : start + chosen.integers(3, 40)] = chosen.integers(1 << 32)
        values.append(value if chosen.random() < 0.9 else np.full(PERMUTATIONS, EMPTY, dtype=np.uint32))
    kept, expected = [], []
    for i, value in enumerate(values):
        banded = value.reshape(BANDS, ROWS)
        alike = [
            k
            for k in kept
            if (values[k].reshape(BANDS, ROWS) == banded).all(axis=1).any() and (values[k] == value).mean() >= THRESHOLD
        ]
        if not alike and not (value == EMPTY).all():
            kept.append(i)
        expected.append(min(alike) if alike else NONE)
    expected = [NONE if (value == EMPTY).all() else original for value, original in zip(values, expected)]
    cuts = sorted(chosen.choice(40, 3, replace=False).tolist())
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "DOCUMENTS", block)
        index = NearDuplicates()
        for first, last in zip([0, *cuts], [*cuts, 40]):
            path = signature_file(folder / f"{first}.sig", values[first:last])
            found += index.add(path, 2 * first, np.arange(last - first)).tolist()
        index.close()
    assert [number if number == NONE else number // 2 for number in found] == expected
    assert any(number != NONE for number in expected)
    assert all(path.suffix == ".sig" for path in folder.iterdir())


def test_documents_that_are_left_out_otherwise_are_not_compared(tmp_path):
    value = np.arange(PERMUTATIONS, dtype=np.uint32)
    index = NearDuplicates()
    path = signature_file(tmp_path / "a.sig", [value, value, value])
    assert index.add(path, 100, np.array([1, 2])).tolist() == [NONE, 102]
    assert index.add(signature_file(tmp_path / "b.sig", []), 110, np.array([], dtype=np.int64)).tolist() == []
    assert index.add(signature_file(tmp_path / "c.sig", [value]), 110, np.array([0])).tolist() == [102]
    index.close()


def jaccard(one: str, other: str) -> float:
    """Share of the runs of five words, by hand."""
    runs = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (one.split(), other.split())]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_signatures_estimate_the_similarity():
    pytest.importorskip("datasketch")
    chosen, minhash = random.Random(5), MinHash()
    words = [f"w{i}" for i in range(1000)]
    for share in (0.2, 0.5, 0.8, 0.95):
        other = [word if i < share * 1000 else chosen.choice("xyz") + word for i, word in enumerate(words)]
        texts = " ".join(words), " ".join(other)
        estimate = (minhash.signature(texts[0]) == minhash.signature(texts[1])).mean()
        assert abs(estimate - jaccard(*texts)) < 0.13  # three standard errors of 128 permutations


def test_texts_too_short_to_compare_have_no_signature():
    pytest.importorskip("datasketch")
    assert (MinHash().signature("one two three four") == EMPTY).all()
    assert not (MinHash().signature("one two three four five") == EMPTY).any()
