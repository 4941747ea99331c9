"""Batches masked by document: where documents begin, and that a model then computes each as if it stood alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import Loader, document_bounds, row_batch
from regpt.data.rows import ORDERS, StreamRows, open_rows
from regpt.train.backend import make_loss_sum

EOT = 0
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


class Documents:
    """Documents of such lengths, one after another without end; each begins with EOT, the rest counts up in 1 … 96."""

    source = "documents"

    def __init__(self, lengths: list[int]) -> None:
        tokens = np.arange(sum(lengths)) % 96 + 1
        tokens[np.cumsum([0, *lengths[:-1]])] = EOT
        self.stored, self.epoch_tokens = tokens, len(tokens)

    def tokens(self, start: int, count: int) -> np.ndarray:
        return self.stored[np.arange(start, start + count) % self.epoch_tokens]


@given(LENGTHS, st.integers(1, 12), st.integers(1, 5), st.integers(0, 5))
def test_lengths_and_positions_restart_where_documents_and_rows_begin(lengths, seq_len, n_rows, first):
    batch = row_batch(StreamRows(Documents(lengths), seq_len), first, n_rows, EOT)
    assert batch.positions is not None
    assert batch.cu_seqlens is not None
    assert batch.positions.dtype == batch.cu_seqlens.dtype == torch.int64
    starts, positions = [], []
    for i, token in enumerate(batch.idx.flatten().tolist()):
        if token == EOT or i % seq_len == 0:
            starts.append(i)
        positions.append(i - starts[-1])
    assert batch.positions.tolist() == np.reshape(positions, (n_rows, seq_len)).tolist()
    n_tokens = n_rows * seq_len
    assert batch.cu_seqlens.tolist() == starts + [n_tokens] * (len(batch.cu_seqlens) - len(starts))
    assert batch.cu_seqlens[-1] == n_tokens


@pytest.mark.parametrize(("documents", "shape"), [(1, 2), (2, 4), (3, 4), (4, 8), (127, 128), (128, 256)])
def test_cumulative_lengths_have_few_shapes(documents, shape):
    starts = np.zeros((1, 200), dtype=bool)
    starts[0, :documents] = True
    assert len(document_bounds(starts)[1]) == shape


def test_idx_and_targets_are_those_of_the_unmasked_batch():
    rows = StreamRows(Documents([4, 7, 3, 9]), 5)
    (masked,) = Loader(rows, batch_tokens=20, micro_batch_rows=4, eot=EOT).step(3)
    (plain,) = Loader(rows, batch_tokens=20, micro_batch_rows=4).step(3)
    assert torch.equal(masked.idx, plain.idx)
    assert torch.equal(masked.targets, plain.targets)
    assert plain.positions is plain.cu_seqlens is None


@pytest.mark.parametrize("order", ORDERS)
def test_packed_with_document_mask_equals_each_document_alone(write_shards, order):
    """Loss and gradients, to the rounding of another order of summation. A document's last token predicts the next
    one's end-of-text token, which is the same whatever follows."""
    folder, manifest, tokens = write_shards([5, 9, 2, 30, 4, 4, 7, 12, 1, 6], vocab_size=97)
    starts = np.cumsum([0, 5, 9, 2, 30, 4, 4, 7, 12, 1])
    tokens[starts] = EOT
    tokens.astype("uint16").tofile(folder / "train-00000.bin")
    batch = row_batch(open_rows(folder, manifest, "train", order, 1, tiny.SEQ_LEN), 0, 4, EOT)
    alone = [Batch(idx[None], targets[None]) for idx, targets in pieces(batch)]
    assert len(alone) > len(batch.idx)
    packed_loss, packed_gradients = loss_and_gradients([batch])
    alone_loss, alone_gradients = loss_and_gradients(alone)
    unmasked_loss, _ = loss_and_gradients([Batch(batch.idx, batch.targets)])
    assert packed_loss == pytest.approx(alone_loss, rel=1e-12)
    assert abs(unmasked_loss - alone_loss) > 1e-3  # the mask matters here
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, alone_gradients[name], rtol=1e-10, atol=1e-12)


def pieces(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each document of each row, cut out by hand: inputs and targets."""
    found = []
    for idx, targets in zip(batch.idx, batch.targets):
        bounds = sorted({0, len(idx), *(idx == EOT).nonzero().flatten().tolist()})
        found += [(idx[i:j], targets[i:j]) for i, j in pairwise(bounds)]
    return found


def loss_and_gradients(batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny.build_model()
    loss_sum = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
    total = sum(loss_sum(batch) for batch in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert not any((batch.targets == IGNORE_INDEX).any() for batch in batches)
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
