"""The loss of a model: the sum over the valid targets, as its definition says."""

import pytest
import torch

import tiny
from regpt.model.ops import IGNORE_INDEX


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """-ln of the softmax at each valid target, one after another."""
    nats, logits = 0.0, logits.detach()
    for scores, target in zip(logits.flatten(0, 1), targets.flatten().tolist()):
        if target != IGNORE_INDEX:
            nats -= float(torch.log(scores.exp()[target] / scores.exp().sum()))
    return nats


@pytest.mark.parametrize("pad_vocab", [True, False])
def test_it_is_the_sum_over_the_valid_targets(pad_vocab: bool):
    model, (idx, targets) = tiny.build_model(pad_vocab=pad_vocab), tiny.Rows().rows(0)
    assert (targets == IGNORE_INDEX).any()
    assert tiny.loss_sum(model, idx, targets).item() == pytest.approx(by_hand(model(idx), targets), rel=1e-12)


def test_positions_and_document_lengths_reach_the_model():
    model, (idx, targets) = tiny.build_model(), tiny.Rows().rows(0)
    idx, targets = idx[:1], targets[:1]
    documents = {
        "positions": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]),
        "cu_seqlens": torch.tensor([0, 5, 12]),
    }
    alone = sum(by_hand(model(idx[:, part]), targets[:, part]) for part in (slice(0, 5), slice(5, 12)))
    assert tiny.loss_sum(model, idx, targets, **documents).item() == pytest.approx(alone, rel=1e-12)
    assert abs(tiny.loss_sum(model, idx, targets).item() - alone) > 1e-3


def test_it_is_float32_under_autocast():
    model, (idx, targets) = tiny.build_model(dtype=torch.float32), tiny.Rows().rows(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny.loss_sum(model, idx, targets).dtype == torch.float32
