"""Stages of a batch ramp: which tokens their rows hold, against the page's rule by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.data.loader import RampLoader
from regpt.data.mixture import MixedRows
from regpt.data.order import permutation, row_key, shuffled
from regpt.data.ramp import Stage, check_ramp, stage_at, stages_of, step_at, tokens_before
from regpt.data.rows import Rows, open_rows
from regpt.errors import UsageError

LENGTHS = st.lists(st.integers(1, 30), min_size=8, max_size=30)
SHUFFLES = st.sampled_from(["epoch", 2, 3, 7, 1000])
ENTRIES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6])), max_size=4)
SEED = 3


def ramp_of(entries: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Entries of so many rows a batch, each token once."""
    return [(tokens, rows * T, T) for tokens, rows, T in {e[0]: e for e in sorted(entries)}.values()]


def by_hand(
    ramp: list[tuple[int, int, int]], batch_tokens: int, seq_len: int, steps: int
) -> list[tuple[int, int, int]]:
    """Tokens read before each step, and its batch and row length, one step after another."""
    read, found = 0, []
    for _ in range(steps):
        for tokens, batch, length in ramp:
            if read >= tokens:
                batch_tokens, seq_len = batch, length
        batch, length = next(((b, t) for tokens, b, t in reversed(ramp) if read >= tokens), (batch_tokens, seq_len))
        found.append((read, batch, length))
        read += batch
    return found


@given(ENTRIES)
def test_a_stage_begins_at_the_first_step_before_which_its_tokens_are_read(entries):
    ramp = ramp_of(entries)
    stages = stages_of(8, 4, ramp)
    for step, (read, batch, length) in enumerate(by_hand(ramp, 8, 4, 120)):
        stage = stage_at(stages, step)
        assert (tokens_before(stages, step), stage.batch_tokens, stage.seq_len) == (read, batch, length)
        assert step_at(stages, read) == step


def stage_rows(rows: Rows, stages: tuple[Stage, ...], steps: int) -> list[list[int]]:
    """Every row of `steps` steps."""
    loader = RampLoader(rows, stages, micro_batch_rows=1)
    batches = [batch for step in range(steps) for batch in loader.step(step)]
    return [[*idx.tolist(), int(targets[-1])] for b in batches for idx, targets in zip(b.idx, b.targets)]


@pytest.mark.parametrize("order", ["sequential", "shuffle"])
@given(LENGTHS, ENTRIES)
def test_rows_that_are_not_permuted_follow_each_other_without_a_gap(write_shards, order, lengths, entries):
    folder, manifest, _ = write_shards([*lengths, 30])
    opened = lambda T: open_rows(folder, manifest, "train", order, SEED, T, "none")  # noqa: E731
    read = stage_rows(opened(4), stages_of(8, 4, ramp_of(entries)), 40)
    inputs = [token for row in read for token in row[:-1]]
    assert inputs == opened(1).read(0, len(inputs))[:, 0].tolist()
    assert all(row[-1] == following[0] for row, following in pairwise(read))


def permuted_by_hand(tokens: np.ndarray, lengths: list[int], shuffle, counts: list[tuple[int, int]]) -> list[list[int]]:
    """Rows of each length, so many of it: epoch by epoch, segments of a turned stream, each permuted by blocks."""
    left, found, epoch = [list(count) for count in counts], [], 0
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    while any(n for _, n in left):
        stream = np.concatenate([documents[d] for d in permutation(SEED, epoch, len(lengths))]).tolist()
        offset = row_key(SEED, epoch, 2**63) % next(T for T, n in left if n)
        ring = stream[offset:] + stream[:offset]
        ring.append(ring[0])
        token = block = 0
        for part in left:
            T, wanted = part
            n = min(wanted, (len(stream) - token) // T)
            cut = [ring[token + j * T : token + (j + 1) * T + 1] for j in range(n)]
            window = len(stream) // T if shuffle == "epoch" else min(shuffle, len(stream) // T)
            for first in range(0, n, window):
                size = min(window, n - first)
                found += [cut[first + j] for j in shuffled(np.arange(size), size, row_key(SEED, epoch, block))]
                block += 1
            token, part[1] = token + n * T, wanted - n
            if part[1]:
                break  # the epoch is over
        epoch += 1
    return found


@given(LENGTHS, SHUFFLES, ENTRIES)
@settings(max_examples=30)  # each takes a third of a second, by hand
def test_permuted_rows_are_those_of_the_page(write_shards, lengths, shuffle, entries):
    lengths = [*lengths, 30]
    folder, manifest, tokens = write_shards(lengths)
    stages, steps = stages_of(8, 4, ramp_of(entries)), 60
    counts: list[tuple[int, int]] = []
    for step in range(steps):
        stage = stage_at(stages, step)
        n_rows = stage.batch_tokens // stage.seq_len
        if counts and counts[-1][0] == stage.seq_len:
            counts[-1] = (stage.seq_len, counts[-1][1] + n_rows)
        else:
            counts.append((stage.seq_len, n_rows))
    # The rows of the last length have no end that is known beforehand: those of its last epoch are permuted with more.
    counts[-1] = (counts[-1][0], counts[-1][1] + 10 * sum(lengths))
    read = stage_rows(open_rows(folder, manifest, "train", "shuffle", SEED, 4, shuffle), stages, steps)
    if stages[-1].first_step < steps:
        assert read == permuted_by_hand(tokens, lengths, shuffle, counts)[: len(read)]


@given(LENGTHS, SHUFFLES, ENTRIES)
def test_an_epoch_gives_no_token_twice_and_leaves_out_less_than_a_row(write_shards, lengths, shuffle, entries):
    lengths = [*lengths, 30]
    N = sum(lengths)
    folder, manifest, _ = write_shards(lengths)
    read = stage_rows(
        open_rows(folder, manifest, "train", "shuffle", SEED, 4, shuffle), stages_of(8, 4, ramp_of(entries)), 60
    )
    seen: set[int] = set()
    epochs = 0
    for row in read:  # token i of the corpus is i + 1
        if seen & set(row[:-1]):
            assert N - len(seen) < 6, "an epoch ended with a row's worth of tokens unread"
            seen, epochs = set(), epochs + 1
        seen |= set(row[:-1])
    assert sum(len(row) - 1 for row in read) >= (epochs - 1) * (N - 6)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_processes_and_micro_batches_share_the_same_steps(write_shards, processes, at_once):
    folder, manifest, _ = write_shards([40] * 20)
    stages = stages_of(64, 8, [(128, 96, 12), (400, 192, 24), (900, 384, 24)])
    rows = lambda: open_rows(folder, manifest, "train", "shuffle", SEED, 8, "epoch")  # noqa: E731
    whole = RampLoader(rows(), stages, micro_batch_rows=1)
    ranks = [
        RampLoader(rows(), stages, micro_batch_rows=at_once, dp_rank=r, dp_size=processes) for r in range(processes)
    ]
    for step in range(12):
        expected = sorted(row for batch in whole.step(step) for row in batch.idx.tolist())
        batches = [batch for loader in ranks for batch in loader.step(step)]
        assert sorted(row for batch in batches for row in batch.idx.tolist()) == expected
        assert all(batch.idx.numel() <= at_once * 8 or len(batch.idx) == 1 for batch in batches)
    assert {len(batch.idx) for batch in ranks[0].step(8)} == {max(1, at_once * 8 // 24)}


def test_folders_of_a_mixture_go_on_where_each_of_them_stopped(write_shards):
    parts = [write_shards([30] * 40), write_shards([20] * 40)]
    opened = [open_rows(folder, manifest, "train", "sequential", 0, 4) for folder, manifest, _ in parts]
    loader = RampLoader(MixedRows(opened, [3, 1]), stages_of(16, 4, [(32, 48, 8)]), micro_batch_rows=1)
    read = [loader.step(step)[row].idx[0].tolist() for step, row in ((0, 0), (2, 0), (2, 5))]
    assert read[0] == [1, 2, 3, 4]
    assert read[1] == list(range(25, 33))  # after six rows of four
    assert sum(len(batch.idx[0]) for batch in loader.step(2)) == 48
    second = [b.idx[0].tolist() for b in loader.step(2) + loader.step(3)]
    assert list(range(9, 17)) in second  # the other folder, after two rows of four
    assert loader.epochs(2) == [24 / 1200, 8 / 800]


def test_every_row_of_a_ramp_has_its_own_key_of_dropout(write_shards):
    folder, manifest, _ = write_shards([40] * 20)
    rows = open_rows(folder, manifest, "train", "shuffle", SEED, 8, "epoch")
    loader = RampLoader(rows, stages_of(64, 8, [(128, 96, 12), (300, 192, 12)]), micro_batch_rows=1, dropout_seed=1)
    keys = [b.dropout_keys.item() for step in range(8) for b in loader.step(step) if b.dropout_keys is not None]
    assert len(set(keys)) == len(keys) == 8 + 8 + 8 + 8 + 16 * 4


def test_the_order_bos_takes_another_batch_and_refuses_another_row_length(write_shards):
    folder, manifest, _ = write_shards([20] * 60)
    rows = open_rows(folder, manifest, "train", "bos", 0, 9)
    longer = RampLoader(rows, stages_of(18, 9, [(36, 36, 9)]), micro_batch_rows=1)
    read = [batch.idx[0, 0].item() for step in range(4) for batch in longer.step(step)]
    assert read == rows.read(0, 12)[:, 0].tolist()
    with pytest.raises(
        UsageError, match=r"data\.order is bos, whose rows of 9 tokens cannot be followed by rows of 12"
    ):
        RampLoader(rows, stages_of(18, 9, [(36, 36, 12)]), micro_batch_rows=1)


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        (
            [(100, 16, 8), (100, 32, 8)],
            r"\[100, 32, 8\] after 100 tokens; let the tokens at which entries begin increase",
        ),
        ([(100, 20, 8)], r"\[100, 20, 8\], a batch that is not divisible into rows of 8; set it to 16, say"),
        ([(0, 16, 8)], r"\[0, 16, 8\]; give whole numbers from 1 on"),
    ],
)
def test_a_wrong_entry_is_one_sentence(ramp, said):
    with pytest.raises(UsageError, match=said):
        check_ramp(ramp)


def test_a_batch_that_processes_cannot_share_is_one_sentence(write_shards):
    folder, manifest, _ = write_shards([40] * 20)
    rows = open_rows(folder, manifest, "train", "shuffle", SEED, 8, "epoch")
    with pytest.raises(UsageError, match=r"a batch of 24 tokens in rows of 8, which 2 processes cannot share in whole"):
        RampLoader(rows, stages_of(32, 8, [(64, 24, 8)]), micro_batch_rows=1, dp_size=2)
