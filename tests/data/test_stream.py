"""The endless stream, against a reference that concatenates documents epoch after epoch."""

import dataclasses
import os
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.data.manifest import Manifest, Shard
from regpt.data.order import permutation, ranges
from regpt.data.stream import StoredTokens, open_stream
from regpt.errors import UserError

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=20)
CUTS = st.lists(st.integers(1, 100), max_size=6)
ORDERS = st.sampled_from(["shuffle", "sequential"])


def endless_by_hand(tokens: np.ndarray, lengths: list[int], order: str, seed: int, count: int) -> list[int]:
    """The first `count` tokens of the stream, one document after another."""
    starts = np.cumsum([0, *lengths]).tolist()
    stream, epoch = [], 0
    while len(stream) < count:
        documents = permutation(seed, epoch, len(lengths)).tolist() if order == "shuffle" else range(len(lengths))
        for document in documents:
            stream += tokens[starts[document] : starts[document + 1]].tolist()
        epoch += 1
    return stream[:count]


@given(LENGTHS, CUTS, ORDERS, st.integers(0, 99), st.integers(0, 400), st.integers(0, 400))
def test_any_range_equals_the_documents_concatenated_epoch_after_epoch(
    write_shards, lengths, cuts, order, seed, start, count
):
    folder, manifest, tokens = write_shards(lengths, cuts)
    stream = open_stream(folder, manifest, "train", order, seed)
    assert stream.epoch_tokens == sum(lengths)
    expected = endless_by_hand(tokens, lengths, order, seed, start + count)[start:]
    assert stream.tokens(start, count).tolist() == expected


def test_a_document_over_three_shards_is_read_whole(write_shards):
    folder, manifest, tokens = write_shards([3, 20, 2], cuts=[7, 15])
    assert [shard.documents for shard in manifest.shards] == [2, 0, 1]
    assert [shard.continues for shard in manifest.shards] == [True, True, False]
    order = permutation(5, 0, 3).tolist()
    documents = np.split(tokens, [3, 23])
    expected = np.concatenate([documents[d] for d in order])
    assert open_stream(folder, manifest, "train", "shuffle", 5).tokens(0, 25).tolist() == expected.tolist()


def test_an_epoch_follows_the_one_before_without_a_gap(write_shards):
    folder, manifest, _ = write_shards([4, 3, 5])
    stream = open_stream(folder, manifest, "train", "shuffle", 0)
    over_the_boundary = [*stream.tokens(6, 6), *stream.tokens(12, 6)]
    assert stream.tokens(6, 12).tolist() == over_the_boundary
    assert sorted(stream.tokens(12, 12).tolist()) == sorted(stream.tokens(0, 12).tolist())


def test_reading_back_and_forth_changes_nothing(write_shards):
    folder, manifest, _ = write_shards([4, 3, 5, 1, 6])
    read = partial(open_stream(folder, manifest, "train", "shuffle", 3).tokens, count=7)
    places = [0, 15, 100, 17, 0, 99, 1000, 15]
    first = [read(place).tolist() for place in places]
    assert [read(place).tolist() for place in reversed(places)] == first[::-1]


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_positions_beyond_the_32_bit_limit_are_read(write_shards, order):
    folder, manifest, tokens = write_shards([4, 3, 5])
    stream = open_stream(folder, manifest, "train", order, 0)
    assert sorted(stream.tokens(12 * 2**33, 12).tolist()) == tokens.tolist()


def test_splits_are_separate(write_shards):
    folder, manifest, _ = write_shards([5, 5], split="val")
    assert open_stream(folder, manifest, "val", "sequential", 0).epoch_tokens == 10
    with pytest.raises(UserError, match=r"has no tokens in split 'train'; prepare it from more text"):
        open_stream(folder, manifest, "train", "sequential", 0)


def test_data_of_which_nothing_was_held_out_says_how_to_hold_out_some(write_shards):
    folder, manifest, _ = write_shards([5, 5])
    with pytest.raises(UserError, match=r"no tokens in split 'val'; prepare the text again with --val or"):
        open_stream(folder, manifest, "val", "sequential", 0)


def test_vocabularies_above_65536_are_read_as_uint32(write_shards):
    folder, manifest, tokens = write_shards([70_000], vocab_size=100_000)
    assert open_stream(folder, manifest, "train", "shuffle", 0).tokens(0, 70_000).tolist() == tokens.tolist()


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_a_shard_is_mapped_and_not_read(tmp_path, order):
    n_tokens = 2**29
    with (tmp_path / "train-00000.bin").open("wb") as file:
        file.truncate(2 * n_tokens)  # 1 GiB that takes no disk: a sparse file
    np.array([0, n_tokens - 5], dtype="<i8").tofile(tmp_path / "train-00000.idx")
    manifest = Manifest("toy", "", 10, 0, "uint16", (Shard("train-00000.bin", "train", n_tokens, 2, "", ""),))
    tracemalloc.start()
    stream = open_stream(tmp_path, manifest, "train", order, 0)
    assert stream.tokens(n_tokens - 10, 20).tolist() == [0] * 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_a_shard_that_is_cut_while_it_is_read_is_named(write_shards, order):
    folder, manifest, _ = write_shards([5000] * 4)
    stream = open_stream(folder, manifest, "train", order, 0)
    stream.tokens(0, 10_000)
    os.truncate(folder / "train-00000.bin", 100)
    with pytest.raises(
        UserError, match=r"shard .*train-00000\.bin has been cut to 100 of [\d,]+ bytes while it was read"
    ):
        stream.tokens(10_000, 20_000)


def test_a_token_outside_the_vocabulary_is_an_error_that_names_the_folder(write_shards):
    folder, manifest, _ = write_shards([20])
    stream = open_stream(folder, dataclasses.replace(manifest, vocab_size=20), "train", "shuffle", 0)
    assert stream.tokens(0, 19).max() == 19
    with pytest.raises(UserError, match=rf"{folder.name}' holds token 20, the vocabulary ends at 19; find the changed"):
        stream.tokens(0, 20)


@pytest.mark.parametrize("starts", [[0, 7, 5], [0, 5, 5], [0, 5, 12], [-1, 5, 7], [0, 5]])
def test_an_index_that_does_not_fit_its_shard_is_an_error(write_shards, starts):
    folder, manifest, _ = write_shards([5, 2, 5])
    np.array(starts, dtype="<i8").tofile(folder / "train-00000.idx")
    with pytest.raises(UserError, match=r"index .*train-00000.idx does not fit its shard; prepare the folder again"):
        open_stream(folder, manifest, "train", "shuffle", 0)


def test_a_split_that_begins_inside_a_document_is_an_error(write_shards):
    folder, manifest, _ = write_shards([5, 5])
    np.array([1, 5], dtype="<i8").tofile(folder / "train-00000.idx")
    with pytest.raises(UserError, match=r"train-00000.idx does not begin with a document; prepare the folder again"):
        open_stream(folder, manifest, "train", "shuffle", 0)


def test_a_shard_that_cannot_be_opened_is_named(write_shards):
    folder, manifest, _ = write_shards([5])
    shard = folder / "train-00000.bin"
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000.bin cannot be opened \(.+\); restore the file"):
        open_stream(folder, manifest, "train", "sequential", 0)
    shard.mkdir()  # there, but no file: an error of another kind, for root too
    with pytest.raises(UserError, match=r"train-00000.bin cannot be opened \(.+\); check its permissions and ulimit"):
        open_stream(folder, manifest, "train", "sequential", 0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_ranges_are_joined(pairs):
    firsts, counts = np.array([p[0] for p in pairs], int), np.array([p[1] for p in pairs], int)
    assert ranges(firsts, counts).tolist() == [i for first, n in pairs for i in range(first, first + n)]


@given(LENGTHS, CUTS, st.data())
def test_ranges_are_read_one_after_another(write_shards, lengths, cuts, data):
    folder, manifest, tokens = write_shards(lengths, cuts)
    corpus = StoredTokens(folder, manifest, "train")
    position = st.integers(0, len(tokens) - 1)
    begins = np.array(data.draw(st.lists(position, min_size=1, max_size=12)))
    ends = np.array([data.draw(st.integers(begin + 1, len(tokens))) for begin in begins])
    expected = [token for begin, end in zip(begins, ends) for token in tokens[begin:end].tolist()]
    assert corpus.read(begins, ends).tolist() == expected
    assert corpus.read(begins, ends).dtype == corpus.dtype
