import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from naive import random_prompts
from regpt.errors import UserError
from regpt.evals.packing import BatchPlan, Prompt, Tree, best_fit, bucketed, fill, packed, plant

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(lambda sizes: np.array(sizes, dtype=np.int64))


def placed(plans: list[BatchPlan]) -> list[int]:
    return sorted(tree for plan in plans for row in plan.rows for tree in row)


@given(SIZES, st.integers(1, 200))
def test_buckets_hold_each_tree_once_in_batches_of_the_size_asked_for(sizes: np.ndarray, batch_tokens: int):
    plans = bucketed(sizes, batch_tokens)
    assert placed(plans) == list(range(len(sizes)))
    for rows, n_rows, row_tokens in plans:
        assert len(rows) == n_rows
        assert n_rows * row_tokens <= max(batch_tokens, row_tokens)
        assert max(sizes[row].sum() for row in rows) == row_tokens


@given(SIZES)
def test_packed_rows_hold_each_tree_once_and_are_not_overfull(sizes: np.ndarray):
    rows = best_fit(sizes, 40)
    assert sorted(tree for row in rows for tree in row) == list(range(len(sizes)))
    assert all(sizes[row].sum() <= 40 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sizes.sum() // 40) + 40  # far from one row a tree where they are small


def test_packed_batches_have_one_shape():
    sizes = np.random.default_rng(0).integers(1, 300, size=1000)
    plans = packed(sizes, 8192)
    assert placed(plans) == list(range(1000))
    assert {plan[1:] for plan in plans} == {(16, 512)}
    assert len(plans) <= sizes.sum() / 8192 * 1.05 + 1


def test_rows_are_as_long_as_the_longest_tree_needs():
    assert packed(np.array([513, 4]), 2048)[0][1:] == (2, 1024)
    assert packed(np.array([9000]), 2048)[0][1:] == (1, 16384)
    assert packed(np.empty(0, np.int64), 2048) == []


def test_a_tree_is_laid_out_as_the_definition_says():
    tree = Tree(np.array([7, 8, 9]), [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])], [2, 1, 2], [10, 11, 12])
    other = Tree(np.array([20]), [np.array([21])], [1], [13])
    batch = fill(BatchPlan([[0, 1]], 2, 8), [tree, other])
    assert batch.idx.tolist() == [[7, 8, 9, 1, 4, 5, 20, 0], [0] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 0], [0] * 8]
    assert batch.ends.tolist() == [[6, 6, 6, 4, 6, 6, 7, 8], list(range(1, 9))]
    assert batch.targets.tolist() == [1, 2, 3, 5, 6, 21]
    assert batch.slots.tolist() == [2, 3, 2, 4, 5, 6]  # an ending's first token is predicted by the context's last
    assert batch.owners.tolist() == [10, 10, 11, 12, 12, 13]


def test_every_token_sees_its_own_sequence_and_nothing_else():
    trees = plant(random_prompts(40, 97), 100)
    for plan in packed(np.array([tree.size for tree in trees]), 1024):
        batch = fill(plan, trees)
        i = np.arange(plan.row_tokens)
        for row in range(plan.n_rows):
            seen = (i[:, None] >= i) & (i[:, None] < batch.ends[row])
            assert (seen.sum(axis=1) == batch.positions[row] + 1).all()  # as many tokens as stand before it, and itself
            for token in range(plan.row_tokens):
                assert batch.positions[row][seen[token]].tolist() == list(range(batch.positions[row][token] + 1))


def test_endings_that_do_not_fit_lose_the_beginning_of_their_context_alone():
    context, short, long = np.arange(8), np.array([90]), np.arange(50, 55)
    trees = plant([Prompt(context, [long, short], [5, 1]), Prompt(context[:2], [short], [1])], max_seq_len=10)
    assert [list(tree.owners) for tree in trees] == [[0], [1], [2]]
    assert trees[0].context.tolist() == [2, 3, 4, 5, 6, 7]  # 6 + 5 = 11: the last one is only predicted
    assert trees[0].endings[0].tolist() == long.tolist()
    assert trees[1].context.tolist() == list(range(8))


def test_cut_endings_of_one_length_share_what_is_left_of_the_context():
    letters = [np.array([token]) for token in (60, 61, 62)]
    trees = plant([Prompt(np.arange(30), [*letters, np.array([70, 71])], [1, 1, 1, 2])], max_seq_len=10)
    assert [list(tree.owners) for tree in trees] == [[0, 1, 2], [3]]
    assert [len(tree.context) for tree in trees] == [10, 9]
    assert trees[0].size == 10


def test_endings_without_a_common_beginning_have_trees_of_their_own():
    rows = [np.array([1, 2, 9]), np.array([3, 9]), np.arange(20)]
    trees = plant([Prompt(np.empty(0, np.int64), rows, [1, 1, 2])], max_seq_len=10)
    assert [tree.context.tolist() for tree in trees] == [[1, 2], [3], list(range(9, 18))]
    assert [tree.endings[0].tolist() for tree in trees] == [[9], [9], [18, 19]]


def test_a_shared_part_that_does_not_fit_is_cut_like_any_context():
    tree = plant([Prompt(np.arange(8), [np.arange(50, 57)], [2])], max_seq_len=4)[0]
    assert tree.context.tolist() == [52, 53, 54]
    assert tree.endings[0].tolist() == [55, 56]


def test_an_ending_longer_than_the_model_is_refused():
    prompts = [Prompt(np.arange(3), [np.arange(4)], [4]), Prompt(np.arange(3), [np.arange(5)], [5])]
    assert plant(prompts[:1], max_seq_len=4)
    with pytest.raises(UserError, match="item 1 has an ending of 5 tokens, the model reads at most 4"):
        plant(prompts, max_seq_len=4)
