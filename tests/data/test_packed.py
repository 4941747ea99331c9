"""Rows of conversations: each once an epoch and whole, answers as targets, the same loss as one at a time."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from conversation_files import invented, write_conversations
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.documents import row_pieces
from regpt.data.loader import Loader, row_batch
from regpt.data.packed import ALIGNMENT, ConversationRows, pack_whole
from regpt.data.rows import open_rows
from regpt.data.verify import verify
from regpt.errors import UserError
from regpt.model.weights import InitialWeights, load_weights

LENGTHS = st.lists(st.integers(2, 16), min_size=1, max_size=40)
HERE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def open_packed(folder, documents, order="packed", seq_len=16, group=4) -> ConversationRows:
    rows = open_rows(folder, write_conversations(folder, documents), "train", order, 3, seq_len, batch_rows=group)
    assert isinstance(rows, ConversationRows)
    return rows


def best_fit_by_hand(lengths: list[int], row_tokens: int, order: list[int]) -> list[int]:
    """Space left in each row, when each document goes where it leaves the least."""
    spaces: list[int] = []
    for document in sorted(order, key=lambda d: -lengths[d]):
        fitting = [k for k, space in enumerate(spaces) if space >= lengths[document]]
        if not fitting:
            spaces.append(row_tokens)
            fitting = [len(spaces) - 1]
        spaces[min(fitting, key=lambda k: spaces[k])] -= lengths[document]
    return sorted(spaces)


@given(LENGTHS, st.integers(0, 5))
def test_packing_places_every_conversation_once_by_best_fit(lengths, seed):
    documents, row_starts = pack_whole(np.array(lengths), 16, seed)
    assert sorted(documents) == list(range(len(lengths)))
    rows = [documents[i:j] for i, j in itertools.pairwise(row_starts)]
    filled = [sum(lengths[d] for d in row) for row in rows]
    assert all(0 < n <= 16 for n in filled)
    assert sorted(16 - n for n in filled) == best_fit_by_hand(lengths, 16, list(range(len(lengths))))


@given(LENGTHS, st.sampled_from(["packed", "grouped"]))
@HERE
def test_an_epoch_holds_every_conversation_once_and_whole(tmp_path_factory, lengths, order):
    documents = invented(lengths)
    rows = open_packed(tmp_path_factory.mktemp("rows"), documents, order)
    for epoch in (0, 1):
        seen = []
        for row in range(epoch * rows.n_rows, (epoch + 1) * rows.n_rows):
            pieces = row_pieces(rows, row)
            assert [piece.place for piece in pieces] == [0, *np.cumsum([len(p.tokens) for p in pieces])[:-1]]
            seen += [piece.document for piece in pieces]
            assert all(piece.tokens.tolist() == documents[piece.document][0] for piece in pieces)
        assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS)
@HERE
def test_targets_are_the_trained_tokens_that_follow_and_padding_has_none(tmp_path_factory, lengths):
    documents = invented(lengths)
    rows = open_packed(tmp_path_factory.mktemp("rows"), documents)
    idx, targets, parts, starts = rows.read_batch(0, rows.n_rows)
    for k in range(rows.n_rows):
        expected: list[tuple[int, int, int, bool]] = []
        for piece in row_pieces(rows, k):
            ids, own = documents[piece.document]
            for i, token in enumerate(ids):
                target = ids[i + 1] if i + 1 < len(ids) and own[i + 1] else IGNORE_INDEX
                expected.append((token, target, own[i], i == 0))
        padding = rows.seq_len - len(expected)
        expected += [(rows.eot, IGNORE_INDEX, 0, i == 0) for i in range(padding)]
        assert list(zip(idx[k], targets[k], parts[k], starts[k])) == expected


def test_each_epoch_has_an_order_of_its_own_and_a_row_is_a_function_of_its_number(tmp_path):
    rows = open_packed(tmp_path, invented([10] * 30))
    first, second = (rows.placed_rows(epoch * rows.n_rows, rows.n_rows).tolist() for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    whole = rows.read_batch(0, 2 * rows.n_rows)[0]
    assert np.array_equal(whole[25:40], rows.read_batch(25, 15)[0])


def test_grouped_batches_have_rows_of_like_length_and_are_padded_to_a_multiple(tmp_path):
    lengths = [2 + (k * 37) % 199 for k in range(64)]
    rows = open_packed(tmp_path, invented(lengths), "grouped", seq_len=200, group=8)
    widths = [rows.read_batch(8 * k, 8)[0].shape[1] for k in range(8)]
    assert all(width % ALIGNMENT == 0 or width == 200 for width in widths)
    assert min(widths) == ALIGNMENT
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)
    spread = [np.ptp(rows.lengths[rows.layout(8 * k, 8)[0]]) for k in range(8)]
    assert max(spread) < 40


@pytest.mark.parametrize("order", ["packed", "grouped"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_packed_is_unpacked(tmp_path, family, dtype, tolerance, order):
    """Loss and all gradients, each over the largest gradient."""
    documents = invented([7, 5, 3, 16, 9, 2, 4], seed=4)
    rows = open_packed(tmp_path, documents, order)
    rows.eot = 0  # the models have 97 tokens, the bytes 257
    config = tiny.FAMILY_CONFIGS[family]
    model = tiny.make_model(config).to(dtype)
    load_weights(model, InitialWeights(model, 0))

    def found(batches: list[Batch]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        total = torch.stack([tiny.loss_sum(model, *batch[:2], **named(batch)) for batch in batches]).sum()
        total.backward()
        own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return own | {"loss": total.detach()}

    def named(batch: Batch) -> dict[str, torch.Tensor]:
        return {} if batch.positions is None else {"positions": batch.positions, "cu_seqlens": batch.cu_seqlens}

    alone = []
    for ids, parts in documents:
        targets = [t if p else IGNORE_INDEX for t, p in zip(ids[1:], parts[1:])]
        alone.append(Batch(torch.tensor([ids[:-1]]), torch.tensor([targets])))
    packed, unpacked = found([row_batch(rows, 0, rows.n_rows)]), found(alone)
    assert rows.n_rows == (3 if order == "packed" else 7)
    loss = unpacked.pop("loss")
    assert abs(packed.pop("loss") - loss) <= tolerance * abs(loss)
    largest = max(gradient.abs().max() for gradient in unpacked.values())
    assert max((packed[name] - unpacked[name]).abs().max() for name in unpacked) <= tolerance * largest


def test_a_conversation_longer_than_a_row_is_refused_by_number_and_length(tmp_path):
    with pytest.raises(UserError, match=r"conversation 1 of .* has 17 tokens, data.seq_len is 16; set it to 17"):
        open_packed(tmp_path, invented([3, 17]))


def test_conversations_are_not_read_as_text_nor_text_as_conversations(tmp_path, shards):
    from regpt.data.manifest import read_manifest

    manifest = write_conversations(tmp_path, invented([5, 5]))
    with pytest.raises(UserError, match=r"holds conversations.*set data.order to packed or grouped, not shuffle"):
        open_rows(tmp_path, manifest, "train", "shuffle", 0, 16)
    with pytest.raises(UserError, match=r"data.order packed is for conversations"):
        open_rows(shards, read_manifest(shards), "train", "packed", 0, 16)


def test_steps_take_the_same_rows_however_they_are_divided(tmp_path):
    rows = open_packed(tmp_path, invented([5, 9, 12, 16, 16, 3, 8, 11, 14, 16, 10]))

    def idx(micro_batch_rows, size=1):
        loaders = [
            Loader(rows, batch_tokens=4 * 16, micro_batch_rows=micro_batch_rows, dp_rank=rank, dp_size=size)
            for rank in range(size)
        ]
        return torch.cat([batch.idx for k in range(4 // micro_batch_rows // size) for one in loaders
                          for batch in one.step(3)[k : k + 1]])  # fmt: skip

    assert torch.equal(idx(4), idx(1))
    assert torch.equal(idx(4), idx(1, size=2))


def test_verify_finds_damaged_parts_and_conversations_without_a_target(tmp_path):
    write_conversations(tmp_path, invented([5, 9]))
    assert verify(tmp_path) == []
    path = tmp_path / "train-00000.parts"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [line for line in verify(tmp_path) if "train-00000.parts is damaged" in line]
    path.write_bytes(data[:-1])
    assert [line for line in verify(tmp_path) if "13 bytes instead of 14" in line]
    ids, parts = [1, 2, 3], [0, 0, 0]
    write_conversations(tmp_path / "b", [(ids, parts), (ids, [0, 0, 1])])
    assert [line for line in verify(tmp_path / "b") if "1 conversations have nothing to train on" in line]
