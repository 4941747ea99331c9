"""Order of documents. The reference is docs/data-order.md in plain Python integers, written without NumPy."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.data import order
from regpt.data.order import Sequential, Shuffle, epoch_table, permutation, splitmix64

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


@given(LENGTHS, st.lists(st.integers(0, 5), max_size=8))
def test_tables_made_in_the_background_equal_those_made_in_the_foreground(lengths, epochs):
    starts = starts_of(lengths)
    n_tokens = int(starts[-1])
    shuffle = Shuffle(starts, seed=7)
    for epoch in epochs:  # any walk: forwards finds the prepared table, a jump makes one
        read = shuffle.segments(epoch, 0, n_tokens)
        assert positions(read) == positions(epoch_table(starts, 7, epoch).segments(starts, 0, n_tokens))


def test_the_next_table_is_made_near_the_end_of_an_epoch_and_older_ones_are_dropped():
    made = Shuffle(starts_of([10] * 100), seed=0)
    made.segments(3, 0, 875)
    assert list(made.tables.tables) == [3]
    made.segments(3, 870, 876)
    assert list(made.tables.tables) == [3, 4]
    prepared = made.tables.tables[4]
    made.segments(4, 0, 1)
    assert made.tables.tables == {4: prepared}


def test_an_error_in_the_background_reaches_the_reader():
    no_table = Shuffle(starts_of([3]), seed=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        no_table.segments(0, 0, 1)
