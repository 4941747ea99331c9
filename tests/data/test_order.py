"""Order of documents and rows. The reference is docs/data-order.md in plain Python integers, written without NumPy."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from regpt.data import order
from regpt.data.order import Sequential, Shuffle, epoch_table, permutation, row_key, shuffled, splitmix64

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=30)
SEEDS = st.integers(-(2**63), 2**64 - 1)
EPOCHS = st.integers(0, 1000)


def splitmix64_by_hand(seed: int, number: int) -> int:
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def permutation_by_hand(seed: int, epoch: int, n: int) -> list[int]:
    epoch_seed = splitmix64_by_hand(seed, epoch)
    return sorted(range(n), key=lambda d: splitmix64_by_hand(epoch_seed, d) >> 32)  # sorted() is stable


def shuffled_by_hand(place: int, n: int, key: int) -> int:
    a = math.isqrt(n) + 1
    b = (n + a - 1) // a
    while True:
        left, right = place % a, place // a
        for r in range(24 if n < 1024 else 8):
            seed = splitmix64_by_hand(key, r)
            if r % 2 == 0:
                left = (left + splitmix64_by_hand(seed, right) % a) % a
            else:
                right = (right + splitmix64_by_hand(seed, left) % b) % b
        place = right * a + left
        if place < n:
            return place


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int64)


def positions(segments: tuple[np.ndarray, np.ndarray]) -> list[int]:
    return [i for begin, end in zip(*segments) for i in range(begin, end)]


def test_splitmix64_gives_the_published_outputs():
    # The example outputs of https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 0, 4).tolist() == published
    assert splitmix64(1234567, 2, 2).tolist() == published[2:]


def test_the_order_never_changes():
    """Pinned: a change here would silently change the data order of every run and every resume."""
    assert permutation(1337, 0, 8).tolist() == [6, 0, 1, 3, 7, 2, 4, 5]  # the page's example
    assert permutation(1337, 1, 8).tolist() == [4, 1, 0, 5, 6, 2, 3, 7]
    digest = hashlib.sha256(permutation(1337, 3, 100_000).astype("<u4").tobytes()).hexdigest()
    assert digest == "7c044d0d28bcdf414f438c9f0f102aca042953b481709faebb43916e58f986dd"


@given(SEEDS, EPOCHS, st.integers(0, 50))
def test_permutation_is_the_documented_one(seed, epoch, n):
    assert permutation(seed, epoch, n).tolist() == permutation_by_hand(seed, epoch, n)


@given(SEEDS, st.integers(1, 300) | st.integers(1000, 5000), st.lists(st.integers(0, 10**6), max_size=20))
def test_shuffled_is_the_documented_network(key, n, places):
    places = [place % n for place in places]
    assert shuffled(np.array(places, dtype=np.int64), n, key).tolist() == [shuffled_by_hand(p, n, key) for p in places]


@given(SEEDS, st.integers(1, 3000))
def test_shuffled_is_a_permutation_of_any_size(key, n):
    assert sorted(shuffled(np.arange(n), n, key).tolist()) == list(range(n))


@given(SEEDS, st.integers(2**31, 2**40), st.data())
def test_large_permutations_need_no_table(key, n, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9, unique=True)))
    images = shuffled(places, n, key)
    assert images.tolist() == [shuffled_by_hand(place, n, key) for place in places.tolist()]
    assert len(set(images.tolist())) == len(places)
    assert images.max() < n


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10, 12, 16, 101, 1024])
def test_every_place_has_every_image_equally_often(n):
    """Over 10,000 keys: chi-squared of the images of the first, a middle and the last place, and of the step between
    the images of neighbours, which a weak network favours (8 rounds do for 6 places)."""
    images = np.stack([shuffled(np.array([0, n // 2, n - 2, n - 1]), n, key) for key in range(10_000)])
    for sample, cells in [(images[:, 0], n), (images[:, 1], n), (images[:, 3], n)]:
        assert_uniform(np.bincount(sample, minlength=cells))
    assert_uniform(np.bincount((images[:, 3] - images[:, 2]) % n, minlength=n)[1:])


def assert_uniform(counts: np.ndarray) -> None:
    expected = counts.sum() / len(counts)
    squared = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 1 or chi2.sf(squared, len(counts) - 1) > 1e-5


def test_neighbours_are_read_far_apart():
    """Mean distance of the images of neighbouring places, as a share of n: 1/3 for a random permutation."""
    images = shuffled(np.arange(100_000), 100_000, key=7)
    assert np.abs(np.diff(images)).mean() / 100_000 == pytest.approx(1 / 3, abs=0.005)


def test_the_order_of_rows_never_changes():
    """Pinned: a change here would silently change the data order of every run and every resume."""
    assert shuffled(np.arange(10), 10, row_key(1337, 0, 0)).tolist() == [8, 4, 7, 5, 3, 0, 2, 9, 1, 6]
    digest = hashlib.sha256(shuffled(np.arange(100_000), 100_000, row_key(1337, 3, 2)).astype("<u4").tobytes())
    assert digest.hexdigest() == "5f3b89ee23c2cfcb6c714f699ad93991cce94be2880ff23d12b4334c0516acab"


def test_keys_of_rows_differ_by_seed_epoch_and_block_and_from_seeds_of_epochs():
    keys = {row_key(seed, epoch, block) for seed in range(4) for epoch in range(4) for block in range(4)}
    assert len(keys) == 64
    assert row_key(5, 1, 0) == splitmix64_by_hand(splitmix64_by_hand(5, 2**63 + 1), 0)


def test_documents_with_equal_keys_keep_their_stored_order(monkeypatch):
    lower_halves = np.array([9, 5, 7, 1], dtype=np.uint64)
    monkeypatch.setattr(order, "splitmix64", lambda seed, first, count: lower_halves[:count].copy())
    assert permutation(0, 0, 4).tolist() == [0, 1, 2, 3]


@given(LENGTHS, SEEDS, EPOCHS)
def test_shuffle_reads_every_document_once_an_epoch_and_whole(lengths, seed, epoch):
    starts = starts_of(lengths)
    begins, ends = Shuffle(starts, seed).segments(epoch, 0, int(starts[-1]))
    assert sorted(zip(begins.tolist(), ends.tolist())) == list(zip(starts[:-1].tolist(), starts[1:].tolist()))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_of_a_permutation_is_equally_likely():
    """Document 0 of 10 over 10,000 epochs: each place 1,000 times, standard deviation 30."""
    places = np.bincount([permutation(0, epoch, 10).tolist().index(0) for epoch in range(10_000)], minlength=10)
    assert np.all(np.abs(places - 1000) < 150)


@given(st.data(), LENGTHS, SEEDS)
def test_a_range_of_an_epoch_is_that_part_of_the_whole_epoch(data, lengths, seed):
    starts = starts_of(lengths)
    begin = data.draw(st.integers(0, int(starts[-1]) - 1))
    end = data.draw(st.integers(begin + 1, int(starts[-1])))
    for some_order in (Shuffle(starts, seed), Sequential()):
        whole = positions(some_order.segments(2, 0, int(starts[-1])))
        assert positions(some_order.segments(2, begin, end)) == whole[begin:end]


@given(st.data(), LENGTHS, SEEDS)
def test_several_ranges_of_an_epoch_follow_each_other(data, lengths, seed):
    starts = starts_of(lengths)
    n_tokens = int(starts[-1])
    begins = data.draw(st.lists(st.integers(0, n_tokens - 1), min_size=1, max_size=6))
    ends = [data.draw(st.integers(begin + 1, n_tokens)) for begin in begins]
    for some_order in (Shuffle(starts, seed), Sequential()):
        whole = positions(some_order.segments(2, 0, n_tokens))
        expected = [position for begin, end in zip(begins, ends) for position in whole[begin:end]]
        assert positions(some_order.segments(2, np.array(begins), np.array(ends))) == expected


@given(LENGTHS, st.lists(st.integers(0, 5), max_size=8))
def test_epochs_are_read_in_any_order(lengths, epochs):
    starts = starts_of(lengths)
    n_tokens = int(starts[-1])
    shuffle = Shuffle(starts, seed=7)
    for epoch in epochs:
        read = shuffle.segments(epoch, 0, n_tokens)
        assert positions(read) == positions(epoch_table(starts, 7, epoch).segments(starts, 0, n_tokens))


def test_keys_of_many_documents_are_made_in_place():
    """Ten million documents are opened in 24 bytes each: their keys, one temporary of the mixer, where they start."""
    tracemalloc.start()
    splitmix64(0, 0, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 17e6
