"""The silent bugs of preferences and rewards, each as a test that is also seen to fail on the bug itself.

The numbers are those of the table in docs/finetune.md, which names where each was met.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.engine.engine import Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request
from regpt.train.config import GrpoConfig, PreferenceConfig
from regpt.train.grpo import AGREEMENT, PolicyGradient, advantages, overlong_penalty
from regpt.train.preference import Answers, Preference

# ---- 14: log-probabilities averaged over an answer, not summed


class Averaged(Preference):
    def answers(self, batch: Batch) -> Answers:
        found = super().answers(batch)
        return found._replace(logps=found.logps / found.lengths)


def dpo_error(kind: type[Preference]) -> float:
    """Relative, of the loss of one pair whose answers have three tokens and one."""
    model = tiny.build_model()
    idx = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 6]])
    targets = torch.tensor([[IGNORE_INDEX, 3, 4, 5, IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX]])
    places = {"positions": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), "cu_seqlens": torch.tensor([0, 5, 8])}
    pair = {"pairs": torch.tensor([[0, 1]]), "scored": targets, "reference": torch.tensor([[-3.0, -2.0]])}
    loss = kind(model, PreferenceConfig("dpo", beta=0.5, nll=0.0)).loss_sum(
        Batch(idx, targets)._replace(**places, **pair)
    )[0]
    sums = []
    for tokens, first in (([1, 2, 3, 4, 5], 2), ([1, 2, 6], 2)):
        logps = model(torch.tensor([tokens]))[0].log_softmax(-1)
        sums.append(sum(logps[i - 1, tokens[i]].item() for i in range(first, len(tokens))))
    by_hand = math.log1p(math.exp(-0.5 * ((sums[0] + 3) - (sums[1] + 2))))
    return abs(loss.item() - by_hand) / by_hand


def test_14_log_probabilities_of_an_answer_are_summed():
    assert dpo_error(Preference) < 1e-12
    assert dpo_error(Averaged) > 0.1  # the bug


# ---- 17: the length of a reply, or padding, changes what its tokens weigh


class OverPlaces(PolicyGradient):
    """Divides by all places of a row, those after a reply's end too."""

    def token_weights(self, drawn: Tensor, dtype: torch.dtype) -> Tensor:
        return drawn.to(dtype) / drawn.size(1)


def token_gradients(
    kind: type[PolicyGradient], loss: str, lengths: list[int], places: int, rows: int = 0
) -> list[float]:
    """Of the mean loss with respect to the log-probability of the first token of each reply; `rows` are empty ones."""
    objective = kind(tiny.build_model(), GrpoConfig("chat:addition", loss=loss), places)  # type: ignore[arg-type]
    n = len(lengths) + rows
    drawn = torch.arange(places) < torch.tensor([*lengths, *[0] * rows])[:, None]
    logps = torch.zeros(n, places, dtype=torch.float64, requires_grad=True)
    objective.logps = lambda batch: (logps, drawn)  # type: ignore[method-assign]
    targets = torch.where(drawn, 1, IGNORE_INDEX)
    batch = Batch(targets, targets, advantages=torch.ones(n), drawn=torch.zeros(n, places))
    (objective.loss_sum(batch)[0] / objective.units([batch])).backward()
    assert logps.grad is not None
    return logps.grad[: len(lengths), 0].tolist()


def test_17_what_a_token_weighs_is_what_the_normalisation_says():
    lengths = [1, 4, 2]
    for places, rows in ((4, 0), (9, 0), (9, 5)):  # padding changes nothing
        assert token_gradients(PolicyGradient, "dapo", lengths, places, rows) == pytest.approx([-1 / 7] * 3)
        assert token_gradients(PolicyGradient, "grpo", lengths, places, rows) == pytest.approx(
            [-1 / 3, -1 / 12, -1 / 6]
        )
        assert token_gradients(PolicyGradient, "dr_grpo", lengths, places, rows) == pytest.approx([-1 / 3 / places] * 3)
    wrong = [token_gradients(OverPlaces, "grpo", lengths, places)[0] for places in (4, 9)]
    assert abs(wrong[0] / wrong[1] - 1) > 0.5  # the bug


def test_advantages_are_those_of_the_papers():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64).numpy()
    third = math.sqrt(3)
    assert advantages(rewards, "grpo") == pytest.approx(
        torch.tensor([[1, -1, -1, 1], [third, *[-1 / third] * 3], [0] * 4]).numpy(), abs=1e-6
    )
    assert advantages(rewards, "dr_grpo")[1].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert [overlong_penalty(n, 10, 4) for n in (6, 7, 10)] == [0, -0.25, -1]  # equation 13 of DAPO
    assert overlong_penalty(10, 10, 0) == 0


def test_the_loss_is_the_clipped_one_of_the_papers():
    """By hand, token by token: ratios inside and outside of both ends, better and worse replies, and the divergence."""
    config = GrpoConfig("chat:addition", loss="dapo", clip_low=0.2, clip_high=0.3, beta=0.1)
    objective = PolicyGradient(tiny.build_model(), config, 3)
    drawn = torch.tensor([[True, True, True], [True, True, False]])
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.1, -1.0, -1.0], [-1.0, -1.6, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.2, -1.9, -0.4], [-1.0, -0.9, 0.0]], dtype=torch.float64)
    objective.logps = lambda batch: (logps, drawn)  # type: ignore[method-assign]
    better = torch.tensor([2.0, -1.0], dtype=torch.float64)
    batch = Batch(drawn.long(), drawn.long(), advantages=better, drawn=old, reference=reference)
    loss, extras = objective.loss_sum(batch)
    expected, clipped = 0.0, 0
    for i in range(2):
        for t in range(3 - i):
            ratio = math.exp(logps[i, t].detach() - old[i, t])
            inside = min(max(ratio, 0.8), 1.3)
            gap = (reference[i, t] - logps[i, t]).item()
            expected += -min(ratio * better[i].item(), inside * better[i].item()) + 0.1 * (math.exp(gap) - gap - 1)
            clipped += ratio > 1.3 if better[i] > 0 else ratio < 0.8
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert extras["clipped"].item() == clipped == 2
    assert extras["max_delta_logp"].item() == pytest.approx(1.0)
    assert extras["entropy"].item() == pytest.approx(5.7)
    loss.backward()
    assert logps.grad is not None
    assert logps.grad[0, 2].item() == pytest.approx(-0.1 * (math.exp(0.1) - 1))  # clipped: of the divergence alone


# ---- 18: log-probabilities of training are not those that the engine drew with


def largest_difference(temperature: float, trained: float, *, processed: bool) -> float:
    model = tiny.build_model(dtype=torch.float32)
    engine = Engine(model, max_rows=16)
    engine.decode_step.processed = processed
    asked = Request([5, 6, 7, 8], 6, SamplingOptions(temperature=temperature, top_k=0), 3, n=16)
    engine.submit(asked)
    ids, drawn = [[] for _ in range(16)], [[] for _ in range(16)]
    while engine.busy:
        for event in engine.step():
            ids[event.choice].append(event.token)
            drawn[event.choice].append(event.logprob)
    objective = PolicyGradient(model, GrpoConfig("chat:addition", temperature=trained), 6)
    idx = torch.tensor([[5, 6, 7, 8, *new] for new in ids])
    targets = F.pad(idx[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets[:, :3] = IGNORE_INDEX
    logps, mask = objective.logps(Batch(idx, targets))
    assert mask.all()
    return (logps - torch.tensor(drawn)).abs().max().item()


def test_18_training_has_the_log_probabilities_that_tokens_were_drawn_with():
    for temperature in (0.7, 1.0, 1.5):
        assert largest_difference(temperature, temperature, processed=True) < 2e-5 < AGREEMENT[torch.float32]
    assert largest_difference(0.7, 1.0, processed=True) > 0.1  # the bug: training without the temperature
    assert largest_difference(0.7, 0.7, processed=False) > 0.1  # the bug: the engine's before processing
