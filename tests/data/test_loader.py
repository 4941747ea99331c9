"""The loader, against rows cut by hand and against the lecture's loader."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regpt.data.loader import Loader, row_batch
from regpt.data.rows import ORDERS, StreamRows, open_rows
from regpt.errors import UsageError, UserError


class Counting:
    """A stream whose token i is i."""

    source = "split 'train' of 'toy'"

    def __init__(self, epoch_tokens: int = 10**9) -> None:
        self.epoch_tokens = epoch_tokens

    def tokens(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.int64)


def counting_rows(seq_len: int, epoch_tokens: int = 10**9) -> StreamRows:
    return StreamRows(Counting(epoch_tokens), seq_len)


class DataLoaderLite:
    """build-nanogpt's loader within one shard, in its own words (train_gpt2.py, class DataLoaderLite)."""

    def __init__(self, tokens, B, T, process_rank, num_processes):
        self.tokens, self.B, self.T, self.num_processes = tokens, B, T, num_processes
        self.current_position = B * T * process_rank

    def next_batch(self):
        B, T = self.B, self.T
        buf = self.tokens[self.current_position : self.current_position + B * T + 1]
        x = (buf[:-1]).view(B, T)
        y = (buf[1:]).view(B, T)
        self.current_position += B * T * self.num_processes
        return x, y


def rows_of(batches) -> list[tuple]:
    return sorted((*idx, *targets) for b in batches for idx, targets in zip(b.idx.tolist(), b.targets.tolist()))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_sequential_batches_are_the_lectures(write_shards, world_size):
    folder, manifest, tokens = write_shards([7, 100, 30, 500])
    B, T, accumulation, steps = 2, 4, 3, 3
    rows = open_rows(folder, manifest, "train", "sequential", 0, T)
    for rank in range(world_size):
        lecture = DataLoaderLite(torch.from_numpy(tokens), B, T, rank, world_size)
        loader = Loader(
            rows,
            batch_tokens=B * T * world_size * accumulation,
            micro_batch_rows=B,
            dp_rank=rank,
            dp_size=world_size,
        )
        for step in range(steps):
            batches = loader.step(step)
            assert len(batches) == accumulation
            for batch in batches:
                x, y = lecture.next_batch()
                assert torch.equal(batch.idx, x)
                assert torch.equal(batch.targets, y)


@given(st.data(), st.sampled_from(ORDERS), st.integers(0, 30))
def test_a_step_has_the_same_rows_for_any_world_size_and_micro_batch(write_shards, data, order, step):
    folder, manifest, _ = write_shards([5, 1, 30, 12, 50, 9, 40] * 5, cuts=[20, 60])
    rows, seq_len = 24, 6
    source = open_rows(folder, manifest, "train", order, 11, seq_len)
    dp_size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    micro_batch_rows = data.draw(st.sampled_from([b for b in range(1, 25) if (rows // dp_size) % b == 0]))
    batches = []
    for rank in range(dp_size):
        loader = Loader(
            source,
            batch_tokens=rows * seq_len,
            micro_batch_rows=micro_batch_rows,
            dp_rank=rank,
            dp_size=dp_size,
        )
        batches += loader.step(step)
    first = step * rows
    by_hand = [source.read(row, 1)[0].tolist() for row in range(first, first + rows)]
    assert rows_of(batches) == sorted((*row[:-1], *row[1:]) for row in by_hand)
    assert all(batch.idx.shape == (micro_batch_rows, seq_len) for batch in batches)


@given(st.sampled_from(ORDERS), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_read_after_a_restart_is_the_step_read_straight_through(write_shards, order, steps):
    folder, manifest, _ = write_shards([5, 1, 30, 12, 50, 9, 40] * 2, cuts=[20, 60])

    def fresh() -> Loader:
        rows = open_rows(folder, manifest, "train", order, 2, 8)
        return Loader(rows, batch_tokens=64, micro_batch_rows=4)

    straight = fresh()
    expected = [rows_of(straight.step(step)) for step in range(41)]
    for step in steps:
        assert rows_of(fresh().step(step)) == expected[step]


def test_batches_are_int64_with_targets_one_token_on():
    (batch,) = Loader(counting_rows(3), batch_tokens=6, micro_batch_rows=2).step(1)
    assert batch.idx.dtype == batch.targets.dtype == torch.int64
    assert batch.idx.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert batch.targets.tolist() == [[7, 8, 9], [10, 11, 12]]
    assert batch.positions is None
    assert batch.cu_seqlens is None


def test_masking_a_target_leaves_idx_alone():
    batch = row_batch(counting_rows(3), 0, 2)
    batch.targets.fill_(-100)
    assert batch.idx.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rows_can_be_read_at_any_place():
    assert row_batch(counting_rows(4), 5, 1).idx.tolist() == [[20, 21, 22, 23]]


def test_steps_beyond_the_32_bit_limit_are_read():
    (batch,) = Loader(counting_rows(2), batch_tokens=4, micro_batch_rows=2).step(2**31)
    assert batch.idx[0].tolist() == [2**33, 2**33 + 1]


@pytest.mark.gpu
def test_batches_can_be_pinned():
    (batch,) = Loader(counting_rows(3), batch_tokens=6, micro_batch_rows=2, pin_memory=True).step(0)
    assert batch.idx.is_pinned()
    assert batch.targets.is_pinned()


@pytest.mark.parametrize(
    ("seq_len", "batch_tokens", "micro_batch_rows", "dp_size", "complaint"),
    [
        (
            1024, 500_000, 16, 2,
            "train.batch_tokens 500000 is not a multiple of 32768 = data.seq_len 1024 × train.micro_batch_rows 16 × "
            "2 processes; set train.batch_tokens to 491520 or 524288",
        ),
        (
            1024, 524_288, 48, 1,
            "train.batch_tokens 524288 is not a multiple of 49152 = data.seq_len 1024 × train.micro_batch_rows 48 × "
            "1 process; set train.batch_tokens to 491520 or 540672, or train.micro_batch_rows to 32 or 64",
        ),
        (
            1024, 8192, 16, 1,
            "train.batch_tokens 8192 is not a multiple of 16384 = data.seq_len 1024 × train.micro_batch_rows 16 × "
            "1 process; set train.batch_tokens to 16384, or train.micro_batch_rows to 8",
        ),
        (
            1024, 4096, 2, 8,
            "8 processes are more than the 4 rows of train.batch_tokens 4096 at data.seq_len 1024; start at most 4, "
            "or set train.batch_tokens to 16384",
        ),
        (
            1024, 1000, 1, 1,
            "train.batch_tokens 1000 holds no row of data.seq_len 1024; set train.batch_tokens to 1024",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_answered_with_numbers_that_would_do(
    seq_len, batch_tokens, micro_batch_rows, dp_size, complaint
):
    with pytest.raises(UsageError) as error:
        Loader(
            counting_rows(seq_len),
            batch_tokens=batch_tokens,
            micro_batch_rows=micro_batch_rows,
            dp_size=dp_size,
        )
    assert str(error.value) == complaint


@given(st.integers(1, 50), st.integers(1, 5000), st.integers(1, 20), st.integers(1, 9))
def test_every_number_that_a_message_offers_does(seq_len, batch_tokens, micro_batch_rows, dp_size):
    def attempt(batch_tokens, micro_batch_rows):
        Loader(counting_rows(seq_len), batch_tokens=batch_tokens, micro_batch_rows=micro_batch_rows, dp_size=dp_size)

    try:
        attempt(batch_tokens, micro_batch_rows)
    except UsageError as error:
        for key, numbers in offers(str(error)).items():
            for number in numbers:
                attempt(**{"batch_tokens": batch_tokens, "micro_batch_rows": micro_batch_rows, key: number})


def offers(message: str) -> dict[str, list[int]]:
    """`set train.batch_tokens to 6 or 9, or train.micro_batch_rows to 2` → {"batch_tokens": [6, 9], …}"""
    way_out = message.split("; ")[1].partition("set ")[2]
    found = {}
    for part in way_out.split(", or "):
        key, numbers = part.split(" to ")
        found[key.removeprefix("train.")] = [int(number) for number in numbers.split(" or ")]
    return found


@pytest.mark.parametrize(
    ("epoch_tokens", "way_out"),
    [
        (1000, "set train.batch_tokens to 896, or prepare more text"),
        (100, "set data.seq_len to 25 and train.batch_tokens to 100, or prepare more text"),
        (3, "prepare more text"),
    ],
)
def test_a_corpus_smaller_than_one_batch_is_answered_with_what_fits(epoch_tokens, way_out):
    with pytest.raises(UserError) as error:
        Loader(counting_rows(32, epoch_tokens), batch_tokens=1024, micro_batch_rows=4)
    rows = f"{epoch_tokens:,} tokens, {epoch_tokens // 32} rows of data.seq_len 32"
    expected = f"split 'train' of 'toy' has {rows}, fewer than one batch of 1,024 tokens; {way_out}"
    assert str(error.value) == expected
    assert error.value.exit_code == 1


def test_a_corpus_of_exactly_one_batch_will_do():
    assert len(Loader(counting_rows(32, 1024), batch_tokens=1024, micro_batch_rows=4).step(0)) == 8
