"""One draw, told: it is the draw, and its numbers are those of NumPy."""

import numpy as np
import pytest
import torch

from regpt.engine.explain import explain_draw
from regpt.engine.noise import gumbel, split_seeds
from regpt.engine.processing import SamplingOptions, draw, rows_of

V = 80
OPTIONS = [
    SamplingOptions(top_k=0),
    SamplingOptions(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05),
    SamplingOptions(temperature=2.0, top_k=5),
    SamplingOptions(temperature=0.0, top_k=0),
    SamplingOptions(top_k=1),
    SamplingOptions(top_k=0, top_p=1e-9),
    SamplingOptions(top_k=0, logit_bias=((3, 5.0), (4, -100.0)), repetition_penalty=1.5, presence_penalty=0.5),
]


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_the_token_is_the_one_that_is_drawn_and_the_path_ends_with_it(options):
    text = [3, 7, 7], [9, 9]
    for seed in range(40):
        logits = logits_of(seed)
        rows = rows_of([options], [seed], V, [text])
        drawn = int(draw(logits[None], rows, torch.tensor([5])).tokens[0])
        found = explain_draw(logits, options, seed, 5, text)
        assert found is not None
        assert found.token == drawn
        open_paths = [one for one in found.paths if one.dropped_by is None]
        assert max(open_paths, key=lambda one: one.score + one.noise).token == drawn


def test_its_numbers_are_those_of_numpy():
    options, seed, at = SamplingOptions(temperature=0.8, top_k=30, top_p=0.9, min_p=0.2), 11, 4
    logits = logits_of(1) / 2
    found = explain_draw(logits, options, seed, at, most=V)
    assert found is not None
    values = logits.double().numpy()
    order = np.argsort(-values, kind="stable")
    model = np.exp(values) / np.exp(values).sum()
    scores = (values - values.max()) / 0.8
    ranked = order[:30]
    shares = np.exp(scores[ranked]) / np.exp(scores[ranked]).sum()
    nucleus = ranked[np.cumsum(shares) - shares < 0.9]
    left = nucleus[np.exp(scores[nucleus]) >= 0.2]
    noise = gumbel(split_seeds([seed]), torch.tensor([at]), torch.arange(V))[0].numpy()
    assert [one.token for one in found.paths] == order.tolist()
    assert [one.rank for one in found.paths] == list(range(1, V + 1))
    assert found.kept == len(left) < len(nucleus) < 30
    for one in found.paths:
        i = one.token
        expected = "top_k" if i not in ranked else "top_p" if i not in nucleus else "min_p" if i not in left else None
        assert one.dropped_by == expected
        chance = np.exp(scores[i]) / np.exp(scores[left]).sum() if i in left else 0.0
        given = [one.logit, one.adjusted, np.exp(one.logprob), one.score, one.probability, one.noise]
        assert given == pytest.approx([values[i], values[i], model[i], scores[i], chance, noise[i]], rel=1e-5, abs=1e-6)


def test_only_the_likeliest_and_the_nearest_contenders_are_told():
    found = explain_draw(logits_of(3), SamplingOptions(top_k=0), 5, 9, most=6)
    assert found is not None
    assert [one.rank for one in found.paths][:6] == [1, 2, 3, 4, 5, 6]
    assert len(found.paths) <= 6 + 3 + 1


def test_logits_that_are_not_finite_have_no_explanation():
    logits = logits_of(0)
    logits[2] = torch.nan
    assert explain_draw(logits, SamplingOptions(), 1, 1) is None
