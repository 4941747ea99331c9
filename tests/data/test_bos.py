"""Rows of the order `bos`: nothing invented, nothing lost but what is reported, the same wherever reading begins."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from regpt.data.bos import BLOCK, WINDOW, PackedRows, pack
from regpt.data.order import permutation, row_key, shuffled, splitmix64
from regpt.data.rows import open_rows
from regpt.data.stream import StoredTokens, document_starts
from regpt.errors import UsageError, UserError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)
SHUFFLES = st.sampled_from(["none", "epoch", 2, 5])


def pack_by_hand(lengths: list[int], row_tokens: int) -> list[list[tuple[int, int]]]:
    """The documented packing, one document at a time: rows of (document, tokens)."""
    waiting = {d: min(n, row_tokens) for d, n in enumerate(lengths)}
    rows, row, space = [], [], row_tokens
    while waiting:
        fitting = [d for d in waiting if waiting[d] <= space]
        longest, shortest = (lambda d: (-waiting[d], d)), (lambda d: (waiting[d], d))
        document = min(fitting, key=longest) if fitting else min(waiting, key=shortest)
        taken = min(waiting.pop(document), space)
        row, space = [*row, (document, taken)], space - taken
        if space == 0:
            rows, row, space = [*rows, row], [], row_tokens
    return rows


def packed(
    write_shards, lengths, seq_len, *, window=WINDOW, cuts=(), shuffle_rows="none"
) -> tuple[PackedRows, np.ndarray, list[int]]:
    """(rows, tokens, starts); hypothesis is told to try another corpus when this one fills no row."""
    folder, manifest, tokens = write_shards(lengths, cuts)
    starts = document_starts(folder, manifest, "train")
    try:
        rows = PackedRows(StoredTokens(folder, manifest, "train"), starts, 3, seq_len, shuffle_rows, window=window)
    except UserError as error:
        assume("fill no row" not in str(error))
        raise
    return rows, tokens, starts.tolist()


def epoch_of(rows: PackedRows) -> list[list[int]]:
    return rows.read(0, rows.epoch_rows(10**9)).tolist()


@given(LENGTHS, st.integers(1, 20))
def test_documents_are_packed_as_documented(lengths, row_tokens):
    packing = pack(np.array(lengths), row_tokens)
    placed = list(zip(packing.documents.tolist(), packing.tokens.tolist()))
    rows = [placed[i:j] for i, j in pairwise(packing.row_starts.tolist())]
    assert rows == pack_by_hand(lengths, row_tokens)


def test_a_row_takes_the_longest_that_fits_and_crops_the_shortest_when_none_does():
    packing = pack(np.array([3, 7, 5, 20]), 10)
    assert packing.documents.tolist() == [3, 1, 0]  # 20 is cropped to a row, 7 and 3 fill one, 5 fills none
    assert packing.tokens.tolist() == [10, 7, 3]
    assert pack(np.array([6, 9, 8]), 10).tokens.tolist() == [9, 1]  # 1 of 6, the shortest; 8 fills no row


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), SHUFFLES, st.lists(st.integers(1, 300), max_size=4))
def test_no_token_is_lost_or_invented_beyond_the_reported_share(write_shards, lengths, seq_len, window, shuffle, cuts):
    rows, tokens, starts = packed(write_shards, lengths, seq_len, window=window, shuffle_rows=shuffle, cuts=cuts)
    epoch = epoch_of(rows)
    assert all(len(row) == seq_len + 1 for row in epoch)
    read = Counter(token for row in epoch for token in row)  # token i of the corpus is i + 1
    assert max(read.values()) == 1
    assert read.keys() <= set(tokens.tolist())
    assert rows.left_out() == pytest.approx(1 - len(read) / len(tokens))
    for begin, end in pairwise(starts):  # of every document a beginning is read: all, a part or nothing
        taken = [token - 1 for token in range(begin + 1, end + 1) if token in read]
        assert taken == list(range(begin, begin + len(taken)))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), SHUFFLES)
def test_rows_begin_with_documents_and_documents_follow_each_other_in_them(
    write_shards, lengths, seq_len, window, shuffle
):
    rows, _, starts = packed(write_shards, lengths, seq_len, window=window, shuffle_rows=shuffle)
    first_tokens = {start + 1 for start in starts[:-1]}
    for row in epoch_of(rows):
        assert row[0] in first_tokens
        assert all(b == a + 1 or b in first_tokens for a, b in pairwise(row))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), SHUFFLES, st.data())
def test_rows_are_the_same_wherever_reading_begins(write_shards, lengths, seq_len, window, shuffle, data):
    rows, _, _ = packed(write_shards, lengths, seq_len, window=window, shuffle_rows=shuffle)
    straight = rows.read(0, 50).tolist()
    for _ in range(3):
        first = data.draw(st.integers(0, 49))
        count = data.draw(st.integers(0, 50 - first))
        fresh, _, _ = packed(write_shards, lengths, seq_len, window=window, shuffle_rows=shuffle)
        assert fresh.read(first, count).tolist() == straight[first : first + count]
        assert rows.read(first, count).tolist() == straight[first : first + count]


def test_a_window_is_a_function_of_seed_epoch_and_number(write_shards):
    """The page's rule by hand: documents of the epoch, cut into windows, packed, their rows permuted."""
    lengths, seq_len, window, epochs = [5, 9, 2, 30, 4, 4, 7, 12, 1, 6], 5, 3, 3
    rows, tokens, starts = packed(write_shards, lengths, seq_len, window=window)
    per_window = max(window, -(-window * 6 * 10 // 80))
    expected = []
    for epoch in range(epochs):
        order = permutation(3, epoch, 10).tolist()
        epoch_seed = int(splitmix64(3, epoch, 1)[0])
        for number, first in enumerate(range(0, 10, per_window)):
            documents = order[first : first + per_window]
            by_hand = pack_by_hand([lengths[d] for d in documents], seq_len + 1)
            for r in permutation(epoch_seed, number, len(by_hand)).tolist():
                pieces = [tokens[starts[documents[d]] :][:n].tolist() for d, n in by_hand[r]]
                expected.append([token for piece in pieces for token in piece])
    assert rows.read(0, len(expected)).tolist() == expected


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), st.sampled_from(["epoch", 2, 5, 100]))
def test_shuffled_rows_are_the_packed_ones_permuted_block_by_block(write_shards, lengths, seq_len, window, shuffle):
    """A block: all windows of the epoch, or as many as hold the rows asked for, `window` each."""
    rows, _, _ = packed(write_shards, lengths, seq_len, window=window, shuffle_rows=shuffle)
    plain, _, _ = packed(write_shards, lengths, seq_len, window=window)
    n_rows = plain.epoch_rows(10**9)
    windows = plain.epoch_blocks if shuffle == "epoch" else -(-shuffle // window)
    before, expected = 0, []
    for block, first in enumerate(range(0, plain.epoch_blocks, windows)):
        end = plain.rows_before(min(first + windows, plain.epoch_blocks))
        packed_order = [plain.packing(w) for w in range(first, min(first + windows, plain.epoch_blocks))]
        stored = [unshuffled(plain, first + k, packing.n_rows) for k, packing in enumerate(packed_order)]
        places = shuffled(np.arange(end - before), end - before, row_key(3, 0, block))
        expected += [[row for one in stored for row in one][place] for place in places]
        before = end
    assert rows.epoch_rows(10**9) == n_rows
    assert rows.read(0, n_rows).tolist() == expected


def unshuffled(rows: PackedRows, window: int, count: int) -> list[list[int]]:
    """The rows of a window in the order in which they were packed."""
    read = rows.read(rows.rows_before(window), count).tolist()
    order = permutation(int(splitmix64(3, 0, 1)[0]), window, count).tolist()
    return [read[order.index(row)] for row in range(count)]


def test_a_block_of_the_whole_epoch_has_a_limit(write_shards, monkeypatch):
    assert BLOCK == 1 << 18
    assert packed(write_shards, [3] * 20, 2, window=2, shuffle_rows="epoch")[0].epoch_blocks == 1
    monkeypatch.setattr("regpt.data.bos.BLOCK", 8)
    for shuffle in ("epoch", 1000):
        assert packed(write_shards, [3] * 20, 2, window=2, shuffle_rows=shuffle)[0].block_documents == 8
    assert packed(write_shards, [3] * 20, 2, window=2, shuffle_rows=3)[0].block_documents == 4


@pytest.mark.parametrize("shuffle", ["none", "epoch"])
def test_epochs_differ_and_each_is_whole(write_shards, shuffle):
    rows, tokens, _ = packed(write_shards, [10] * 40, 9, shuffle_rows=shuffle)
    first, second = rows.read(0, 40), rows.read(40, 40)
    assert sorted(first.ravel()) == sorted(second.ravel()) == sorted(tokens)
    assert first.tolist() != second.tolist()


def test_documents_as_long_as_rows_lose_nothing_and_longer_ones_their_ends(write_shards):
    assert packed(write_shards, [8] * 10, 7)[0].left_out() == 0
    assert packed(write_shards, [16] * 10, 7)[0].left_out() == 0.5


def test_the_share_left_out_can_be_judged_by_the_first_windows(write_shards):
    rows, _, _ = packed(write_shards, [16] * 5 + [8] * 5, 7, window=2)
    order = permutation(3, 0, 10)[:2]
    assert rows.left_out(windows=1) == pytest.approx(1 - 16 / sum(16 if d < 5 else 8 for d in order))


def test_epochs_count_the_documents_read(write_shards):
    rows, _, _ = packed(write_shards, [8] * 12, 7, window=4)
    assert [rows.epochs(row)[0] for row in (0, 3, 4, 12, 30)] == [0, 0.25, pytest.approx(1 / 3), 1, 2.5]


def test_the_default_window_holds_a_thousand_documents_and_rows(write_shards):
    assert packed(write_shards, [30] * 20, 9)[0].window_documents == WINDOW
    assert packed(write_shards, [2] * 20, 9)[0].window_documents == WINDOW * 5


def test_documents_that_fill_no_row_are_an_error(write_shards):
    folder, manifest, _ = write_shards([5, 3])
    with pytest.raises(UserError, match=r"has 8 tokens, which fill no row of data.seq_len 8 \+ 1; set a smaller"):
        open_rows(folder, manifest, "train", "bos", 0, 8)


def test_an_unknown_order_is_answered_with_the_nearest(write_shards):
    folder, manifest, _ = write_shards([3])
    with pytest.raises(UsageError, match=r"data.order is 'boss' \(did you mean 'bos'\?\); choose from shuffle, seq"):
        open_rows(folder, manifest, "train", "boss", 0, 1)


def test_the_order_never_changes(write_shards):
    """Pinned: a change here would silently change the rows of every run and every resume."""
    lengths = (splitmix64(0, 0, 3000) % 60 + 1).astype(int).tolist()
    rows, _, _ = packed(write_shards, lengths, 15)
    assert (rows.block_documents, rows.epoch_blocks, rows.epoch_rows(10**9)) == (1024, 3, 2609)
    digest = hashlib.sha256(rows.read(0, 10_000).astype("<u2").tobytes()).hexdigest()
    assert digest == "0a3cbb657924b8f0d289e2d0d645b3e9fd3f216ddf3ae39d0b2c8f9c993cd6b0"
    rows, _, _ = packed(write_shards, lengths, 15, shuffle_rows="epoch")
    assert (rows.epoch_blocks, rows.epoch_rows(10**9)) == (1, 2609)
    digest = hashlib.sha256(rows.read(0, 10_000).astype("<u2").tobytes()).hexdigest()
    assert digest == "99b999445285adfe74009b170a5911c39bae076fe3963f41829eee9da5ea08bd"
