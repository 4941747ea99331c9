"""Several folders as one: shares exact to one row anywhere, and each folder's own rows in their own order."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.config import validate_config
from regpt.data.config import DataConfig
from regpt.data.loader import Loader
from regpt.data.mixture import MAX_PERIOD, MixedRows, spread, whole_shares
from regpt.data.rows import ORDERS, StreamRows, open_rows
from regpt.errors import UsageError

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)
WEIGHTS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


class Marked:
    """A stream whose token i is 1000·mark + i."""

    epoch_tokens = 90

    def __init__(self, mark: int) -> None:
        self.mark, self.source = mark, f"split 'train' of 'folder-{mark}'"

    def tokens(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) + 1000 * self.mark


def mixed(counts: list[int], seq_len: int = 3) -> MixedRows:
    return MixedRows([StreamRows(Marked(k), seq_len) for k in range(len(counts))], counts)


@given(COUNTS)
def test_the_share_of_each_folder_is_exact_to_one_row_after_any_number_of_rows(counts):
    turns = spread(counts)
    assert len(turns) == sum(counts)
    given_turns = np.cumsum(np.arange(len(counts))[:, None] == turns, axis=1)
    for k, count in enumerate(counts):
        for n in range(1, len(turns) + 1):
            assert abs(int(given_turns[k, n - 1]) - Fraction(n * count, len(turns))) < 1
        assert given_turns[k, -1] == count


def test_the_pattern_never_changes():
    assert spread([7, 2, 1]).tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2]
    assert spread([1, 1]).tolist() == [0, 1]
    assert spread([3]).tolist() == [0, 0, 0]


@given(COUNTS, st.integers(0, 500), st.integers(1, 100))
def test_each_folder_gives_its_own_rows_in_order(counts, first, count):
    rows = mixed(counts)
    turns = np.resize(rows.turns, first + count)
    seen: Counter[int] = Counter()
    expected = []
    for turn in turns.tolist():
        expected.append([1000 * turn + seen[turn] * 3 + i for i in range(4)])
        seen[turn] += 1
    assert rows.read(first, count).tolist() == expected[first:]


@given(COUNTS, st.integers(0, 10**12))
def test_a_row_far_away_is_found_as_quickly(counts, row):
    rows = mixed(counts)
    passed = [rows.part_row(k, row) for k in range(len(counts))]
    assert sum(passed) == row
    assert all(abs(n - Fraction(row * c, sum(counts))) < 1 for n, c in zip(passed, counts))


def test_steps_are_the_same_for_any_world_size_and_after_any_restart(write_shards):
    folders = [write_shards([9] * 30)[:2], write_shards([4, 25, 13, 30], vocab_size=20)[:2]]
    for order in ORDERS:

        def loader(dp_rank: int, dp_size: int, order: str = order) -> Loader:
            parts = [open_rows(*folder, "train", order, 5, 6) for folder in folders]
            sizes = {"batch_tokens": 8 * 6, "micro_batch_rows": 2}
            return Loader(MixedRows(parts, [2, 1]), **sizes, dp_rank=dp_rank, dp_size=dp_size)

        def rows_of(step: int, dp_size: int, loader=loader) -> list[list[int]]:
            batches = [batch for rank in range(dp_size) for batch in loader(rank, dp_size).step(step)]
            return sorted(row for batch in batches for row in batch.idx.tolist())

        one = loader(0, 1)
        for step in range(12):
            straight = sorted(row for batch in one.step(step) for row in batch.idx.tolist())
            assert straight == rows_of(step, 2) == rows_of(step, 4)


def test_the_epochs_of_each_folder_are_counted():
    rows = mixed([3, 1])
    assert rows.epochs(0) == [0, 0]
    assert rows.epochs(40) == [30 * 3 / 90, 10 * 3 / 90]
    assert Loader(rows, batch_tokens=60, micro_batch_rows=20).epochs(6) == [3.0, 1.0]


@given(COUNTS, st.data())
def test_rows_within_read_no_folder_further_than_allowed(counts, data):
    rows = mixed(counts)
    allowed = [data.draw(st.integers(0, 60)) for _ in counts]
    most = rows.rows_within(allowed)
    assert all(rows.part_row(k, most) <= n for k, n in enumerate(allowed))
    assert any(rows.part_row(k, most + 1) > n for k, n in enumerate(allowed))


@given(WEIGHTS)
def test_weights_written_in_decimals_are_exact(weights):
    shares = whole_shares({str(k): weight / 100 for k, weight in enumerate(weights)})
    assert [Fraction(share, sum(shares)) for share in shares] == [Fraction(w, sum(weights)) for w in weights]


def test_weights_need_no_sum_of_one():
    assert whole_shares({"a": 0.7, "b": 0.2, "c": 0.1}) == whole_shares({"a": 7, "b": 2, "c": 1}) == [7, 2, 1]
    assert whole_shares({"a": 5.0}) == [1]


def test_weights_with_many_digits_are_rounded_to_a_fixed_period():
    shares = whole_shares({"a": 0.3333333, "b": 0.6666667})
    assert sum(shares) == MAX_PERIOD
    assert shares[0] / MAX_PERIOD == pytest.approx(1 / 3, abs=1 / MAX_PERIOD)


def test_a_weight_too_small_to_be_heard_is_an_error():
    with pytest.raises(UsageError, match=r"gives 'b' the weight 1e-07, less than 1/65536 of all; give it more, or"):
        whole_shares({"a": 1.0, "b": 1e-7})


def test_a_mixture_is_written_in_the_configuration_and_read_back():
    config = validate_config({"data": {"mixture": {"web": 0.7, "dir/code": 1}}}, "x.toml")
    assert config.data.mixture == {"web": 0.7, "dir/code": 1.0}
    assert '[data.mixture]\nweb = 0.7\n"dir/code" = 1.0' in config.to_toml()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "a", "mixture": {"b": 1}}, "both data.path 'a' and data.mixture are set; keep one"),
        ({"mixture": {"a": 1, "b": 0}}, "data.mixture gives 'b' the weight 0.0, must be a number above 0"),
        ({"mixture": {"b": -0.5}}, "data.mixture gives 'b' the weight -0.5, must be a number above 0"),
        ({"mixture": {"b": "0.5"}}, "data.mixture.b is '0.5', must be a valid number"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(data, said):
    with pytest.raises(UsageError) as error:
        validate_config({"data": data}, "x.toml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(UsageError, match="must be a number above 0"):
        DataConfig(mixture={"a": weight})
