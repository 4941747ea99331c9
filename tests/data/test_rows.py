"""Rows of the order `shuffle`, permuted over the epoch or within windows, against the page's rule by hand."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.data.config import DataConfig
from regpt.data.order import permutation, row_key, row_offset, shuffled, splitmix64
from regpt.data.rows import ShuffledRows, StreamRows, open_rows
from regpt.errors import UsageError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)
SHUFFLES = st.sampled_from(["epoch", 2, 3, 7, 1000])
SEED = 3


def opened(write_shards, lengths, seq_len, shuffle, cuts=()) -> tuple[ShuffledRows, np.ndarray]:
    folder, manifest, tokens = write_shards(lengths, cuts)
    rows = open_rows(folder, manifest, "train", "shuffle", SEED, seq_len, shuffle)
    assert isinstance(rows, ShuffledRows)
    return rows, tokens


def epoch_by_hand(tokens: np.ndarray, lengths: list[int], seq_len: int, shuffle: str | int, epoch: int) -> list:
    """Documents permuted, the stream turned and cut into rows, the rows permuted."""
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    stream = np.concatenate([documents[d] for d in permutation(SEED, epoch, len(lengths))]).tolist()
    n_rows = len(stream) // seq_len
    offset = row_key(SEED, epoch, 2**63) % seq_len
    stream = stream[offset:] + stream[:offset]
    stream.append(stream[0])  # the target after the last token
    cut = [stream[j * seq_len : (j + 1) * seq_len + 1] for j in range(n_rows)]
    window = n_rows if shuffle == "epoch" else min(int(shuffle), n_rows)
    read = []
    for block, first in enumerate(range(0, n_rows, window)):
        size = min(window, n_rows - first)
        read += [cut[first + j] for j in shuffled(np.arange(size), size, row_key(SEED, epoch, block))]
    return read


@given(LENGTHS, st.integers(1, 12), SHUFFLES, st.lists(st.integers(1, 200), max_size=3))
def test_rows_are_those_of_the_page(write_shards, lengths, seq_len, shuffle, cuts):
    if sum(lengths) < seq_len:
        return
    rows, tokens = opened(write_shards, lengths, seq_len, shuffle, cuts)
    n_rows = sum(lengths) // seq_len
    assert rows.epoch_rows(10**9) == n_rows
    expected = [row for epoch in range(3) for row in epoch_by_hand(tokens, lengths, seq_len, shuffle, epoch)]
    assert rows.read(0, 3 * n_rows).tolist() == expected


@given(LENGTHS, st.integers(1, 12), SHUFFLES, st.data())
def test_rows_are_the_same_wherever_reading_begins(write_shards, lengths, seq_len, shuffle, data):
    if sum(lengths) < seq_len:
        return
    rows, _ = opened(write_shards, lengths, seq_len, shuffle)
    straight = rows.read(0, 60).tolist()
    first = data.draw(st.integers(0, 59))
    count = data.draw(st.integers(1, 60 - first))
    fresh, _ = opened(write_shards, lengths, seq_len, shuffle)
    assert fresh.read(first, count).tolist() == rows.read(first, count).tolist() == straight[first : first + count]


@given(LENGTHS, st.integers(1, 12), SHUFFLES, st.integers(0, 5))
def test_an_epoch_reads_every_token_once_but_for_less_than_a_row(write_shards, lengths, seq_len, shuffle, epoch):
    n_rows = sum(lengths) // seq_len
    if not n_rows:
        return
    rows, tokens = opened(write_shards, lengths, seq_len, shuffle)
    read = rows.read(epoch * n_rows, n_rows)[:, :-1].ravel()  # token i of the corpus is i + 1
    assert len(set(read.tolist())) == len(read) == n_rows * seq_len
    assert len(tokens) - len(read) < seq_len


def test_what_an_epoch_leaves_out_changes_from_epoch_to_epoch(write_shards):
    rows, tokens = opened(write_shards, [3] * 11, 4, "epoch")  # 33 tokens, 8 rows: one is left out
    left_out = [set(tokens.tolist()) - set(rows.read(8 * e, 8)[:, :-1].ravel().tolist()) for e in range(20)]
    assert all(len(one) == 1 for one in left_out)
    assert len(set.union(*left_out)) > 3


def test_one_document_is_cut_into_other_rows_each_epoch(write_shards):
    rows, _ = opened(write_shards, [103], 10, "epoch")
    firsts = [{int(row[0] - 1) % 10 for row in rows.read(10 * e, 10)} for e in range(12)]
    assert all(len(one) == 1 for one in firsts)  # rows of an epoch adjoin
    assert len(set.union(*firsts)) > 5


def test_offsets_of_rows_are_spread_evenly():
    counts = np.bincount([row_offset(seed, epoch, 8) for seed in range(20) for epoch in range(200)], minlength=8)
    assert len(counts) == 8
    assert abs(counts - 500).max() < 100  # 4.8 standard deviations


def test_neighbours_of_a_long_document_are_read_apart(write_shards):
    folder, manifest, _ = write_shards([1000] * 5)
    rows = {way: open_rows(folder, manifest, "train", "shuffle", 0, 10, way) for way in ("epoch", "none")}
    document = {way: (r.read(0, 500)[:, 0] - 1) // 1000 for way, r in rows.items()}
    same = {way: float((read[1:] == read[:-1]).mean()) for way, read in document.items()}
    assert same["none"] > 0.98
    assert same["epoch"] == pytest.approx(0.2, abs=0.06)  # of five documents


def test_a_window_permutes_nothing_beyond_itself(write_shards):
    rows, _ = opened(write_shards, [50], 5, 4)
    firsts = rows.read(0, 10)[:, 0]
    firsts = (firsts - firsts.min()) // 5
    assert [sorted(firsts[k : k + 4].tolist()) for k in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_without_a_permutation_rows_follow_the_documents(write_shards):
    folder, manifest, _ = write_shards([5, 9])
    assert isinstance(open_rows(folder, manifest, "train", "shuffle", SEED, 3, "none"), StreamRows)
    assert isinstance(open_rows(folder, manifest, "train", "sequential", SEED, 3, "epoch"), StreamRows)


def test_epochs_are_counted_in_rows(write_shards):
    rows, _ = opened(write_shards, [10], 3, "epoch")
    assert [rows.epochs(row) for row in (0, 2, 3, 7)] == [[0], [2 / 3], [1], [7 / 3]]


def test_a_split_shorter_than_a_row_has_no_rows(write_shards):
    assert opened(write_shards, [5], 6, "epoch")[0].epoch_rows(9) == 0


def test_the_order_never_changes(write_shards):
    """Pinned: a change here would silently change the rows of every run and every resume."""
    lengths = (splitmix64(0, 0, 3000) % 60 + 1).astype(int).tolist()
    digests = {}
    for shuffle in ("epoch", 512):
        rows, _ = opened(write_shards, lengths, 15, shuffle)
        digests[shuffle] = hashlib.sha256(rows.read(0, 10_000).astype("<u2").tobytes()).hexdigest()
    assert digests == {
        "epoch": "5cd2dcb6b0e98744dd5680949d6ed25303775f0e25855aa03d74db4991d13ebc",
        512: "501e174828746b53905f06aa6498dfe1aae14cb71df2b72c04e7eda880054dfa",
    }


@pytest.mark.parametrize("rows", [1, 0, -3])
def test_a_window_of_one_row_or_fewer_is_refused(write_shards, rows):
    said = rf"data.shuffle_rows is {rows}, must be epoch, none, or a window of at least 2 rows"
    with pytest.raises(UsageError, match=said):
        DataConfig(shuffle_rows=rows)
    with pytest.raises(UsageError, match=said):
        opened(write_shards, [9], 3, rows)
