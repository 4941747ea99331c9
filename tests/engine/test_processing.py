"""Logits processing and draws, against NumPy row by row and against probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.engine.noise import gumbel, split_seeds
from regpt.engine.processing import Drawn, SamplingOptions, choose_candidates, draw, rows_of
from regpt.engine.processing import adjust as adjust_logits
from regpt.errors import UsageError

V = 24
PLAIN = SamplingOptions(top_k=0)


def reference(logits: np.ndarray, options: SamplingOptions, prompt: list[int], new: list[int]) -> np.ndarray:
    """Processed logits of one row in float64, -inf where excluded: each rule as its paper states it."""
    x = logits.astype(np.float64)
    for token, bias in options.logit_bias:
        x[token] += bias
    for token in set(prompt) | set(new):
        x[token] = x[token] / options.repetition_penalty if x[token] > 0 else x[token] * options.repetition_penalty
    for token in set(new):
        x[token] -= options.presence_penalty + options.frequency_penalty * new.count(token)
    order = sorted(range(V), key=lambda i: (-x[i], i))
    if options.temperature == 0:
        keep = order[:1]
    else:
        x = (x - x.max()) / options.temperature
        keep = order[: options.top_k or V]
        probs = np.exp(x[keep]) / np.exp(x[keep]).sum()
        nucleus = 1 + np.searchsorted(np.cumsum(probs), options.top_p) if options.top_p < 1 else V
        keep = [i for i in keep[:nucleus] if np.exp(x[i]) >= options.min_p]
    return np.where(np.isin(np.arange(V), keep), x, -np.inf)


def token_of(x: np.ndarray, seed: int, position: int) -> int:
    noise = gumbel(split_seeds([seed]), torch.tensor([position]), torch.arange(V))[0].double().numpy()
    return int(np.argmax(x + noise))


def draw_rows(logits: torch.Tensor, options: list[SamplingOptions], texts=(), positions=None, **given) -> Drawn:
    """Row i has seed i."""
    positions = torch.arange(len(options)) if positions is None else positions
    texts = texts or [([0], [])] * len(options)
    return draw(logits, rows_of(options, range(len(options)), V, texts), positions, **given)


@pytest.mark.parametrize(("p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_nucleus_ends_where_its_probability_is_exactly_reached(p, kept):
    """Equal logits: probabilities and their sums are exact in binary."""
    rows = 256
    found = draw_rows(torch.zeros(rows, 4), [SamplingOptions(top_k=0, top_p=p)] * rows)
    assert set(found.tokens.tolist()) == set(range(kept))


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, V, 99]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([(), ((3, 2.5), (4, -math.inf))]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 2**20))
def test_every_row_is_processed_and_drawn_as_by_hand_alone(options, key):
    source = torch.Generator().manual_seed(key)
    logits = torch.randn(len(options), V, generator=source, dtype=torch.float64) * 3
    texts = [([1, 2, i], [5, 5, i]) for i in range(len(options))]
    expected = [
        token_of(reference(row.numpy(), one, *text), i, i)
        for i, (row, one, text) in enumerate(zip(logits, options, texts))
    ]
    assert draw_rows(logits, options, texts).tokens.tolist() == expected
    candidates = max(one.candidates(V) for one in options) if all(one.candidates(V) for one in options) else -1
    found = draw_rows(logits.float(), options, texts, candidates=candidates, tolerance=1e-6)
    certain = found.certain.tolist()
    assert [a for a, sure in zip(found.tokens.tolist(), certain) if sure] == [
        a for a, sure in zip(expected, certain) if sure
    ]


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        SamplingOptions(0.7, 0),
        SamplingOptions(1.5, 6),
        SamplingOptions(1.0, 0, 0.8),
        SamplingOptions(1.0, 0, min_p=0.1),
        SamplingOptions(1.0, 9, 0.9, repetition_penalty=1.4, presence_penalty=0.5, logit_bias=((2, 1.0),)),
    ],
)
def test_draws_follow_the_processed_distribution(options):
    """Chi-square over 40,000 positions of one text; the bound is exceeded once in 10⁵."""
    n = 40_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 1.5
    text = ([1, 2], [3, 3])
    rows = rows_of([options] * n, [11] * n, V, [text] * n)
    tokens = draw(logits.expand(n, -1), rows, torch.arange(n)).tokens
    x = reference(logits.numpy(), options, *text)
    expected = np.exp(x - np.logaddexp.reduce(x)) * n
    counts = np.bincount(tokens.numpy(), minlength=V)
    assert counts[expected == 0].sum() == 0
    open_tokens = expected > 0
    squares = ((counts - expected)[open_tokens] ** 2 / expected[open_tokens]).sum()
    freedom = open_tokens.sum() - 1
    assert squares < freedom + 4.3 * math.sqrt(2 * freedom) + 12


def test_what_is_drawn_does_not_depend_on_the_number_of_candidates_put_in_order():
    logits = torch.randn(8, 500).round(decimals=1)  # many equal ones, at the edge too
    options = [SamplingOptions(1.0, k) for k in (1, 2, 3, 5, 8, 13, 21, 34)]
    tokens = [
        draw(logits, rows_of(options, range(8), 500), torch.zeros(8, dtype=torch.int64), n).tokens.tolist()
        for n in (38, 60, 500, -1)
    ]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]


@settings(max_examples=80, deadline=None)
@given(OPTIONS, st.integers(0, 2**20))
def test_a_certain_token_survives_every_error_within_the_tolerance(options, key):
    options = replace(options, top_p=max(0.3, options.top_p))
    source = torch.Generator().manual_seed(key)
    n, tolerance = 64, 2e-3
    logits = torch.randn(V, generator=source, dtype=torch.float64) * 3
    texts = [([1, 2], [5, 5])] * n
    first = draw_rows(logits.expand(n, -1), [options] * n, texts, tolerance=tolerance)
    errors = (torch.rand(n, V, generator=source, dtype=torch.float64) * 2 - 1) * tolerance * logits.abs().max()
    second = draw_rows(logits + errors, [options] * n, texts)
    assert torch.equal(first.tokens[first.certain], second.tokens[first.certain])
    if options.min_p < 1:  # at 1 only equals of the likeliest are drawn
        assert draw_rows(logits.expand(n, -1), [options] * n, texts, tolerance=1e-15).certain.any()


def test_a_mask_permits_nothing_else_and_an_empty_one_is_not_finite():
    logits = torch.randn(2, V)
    allowed = torch.zeros(2, V, dtype=torch.bool)
    allowed[0, 7] = True
    rows = rows_of([PLAIN, PLAIN], [1, 2], V)._replace(allowed=allowed)
    found = draw(logits, rows, torch.tensor([0, 0]))
    assert found.tokens[0] == 7
    assert found.finite.tolist() == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_reported_for_their_row_alone(value):
    logits = torch.randn(3, V)
    logits[1, 5] = value
    assert draw_rows(logits, [PLAIN] * 3).finite.tolist() == [True, False, True]


def test_log_probabilities_are_those_of_the_model_before_processing():
    logits = torch.randn(3, V)
    found = draw_rows(logits, [SamplingOptions(0.5, 3, 0.5)] * 3)
    expected = logits.double().log_softmax(-1).gather(1, found.tokens[:, None])[:, 0]
    assert torch.allclose(found.logprobs.double(), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-320, 1e300])
def test_temperatures_beyond_the_number_format_are_greedy_and_uniform(temperature):
    logits = torch.randn(1, V)
    scores = choose_candidates(logits, rows_of([SamplingOptions(temperature, 0)], [0], V), -1, None).scores
    assert not scores.isnan().any()
    assert (scores[0, 1] < -1e30) if temperature < 1 else (scores[0, 1].abs() < 1e-30)


def test_penalties_follow_their_papers():
    options = SamplingOptions(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.25)
    logits = torch.tensor([[4.0, -4.0, 4.0, 4.0] + [0.0] * (V - 4)])
    found = adjust_logits(logits, rows_of([options], [0], V, [([0, 1], [2, 2])]))
    assert found[0, :4].tolist() == [2.0, -8.0, 2.0 - 1.0 - 0.5, 4.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, "temperature is -1, must be 0 .greedy. or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0, must be above 0"),
        ({"top_p": math.nan}, "top-p is nan"),
        ({"min_p": 1.1}, "min-p is 1.1"),
        ({"repetition_penalty": 0}, "repetition-penalty is 0"),
        ({"repetition_penalty": 5e-324}, "must be from 0.001 to 1000"),
        ({"presence_penalty": math.nan}, "presence-penalty is nan"),
        ({"frequency_penalty": math.inf}, "frequency-penalty is inf"),
        ({"logit_bias": ((-1, 0.0),)}, "logit-bias gives token -1"),
        ({"logit_bias": ((1, math.nan),)}, "logit-bias gives token 1 nan"),
    ],
)
def test_options_out_of_range_are_usage_errors(values, said):
    with pytest.raises(UsageError, match=said):
        SamplingOptions(**values)


def test_a_draw_from_a_whole_large_vocabulary_is_that_of_exact_noise():
    """Most of the noise is then computed in float32 only."""
    logits, n = torch.randn(20, 5000, generator=torch.Generator().manual_seed(3)) * 2, 20
    rows = rows_of([PLAIN, SamplingOptions(0.5, 0), SamplingOptions(3.0, 0, min_p=0.001)] * 7, range(21), 5000)
    rows = rows._replace(numbers=rows.numbers[:n], seeds=rows.seeds[:n])
    found = draw(logits, rows, torch.zeros(n, dtype=torch.int64), 0, tolerance=1e-6)
    every = draw(logits, rows, torch.zeros(n, dtype=torch.int64), -1, tolerance=1e-6)
    assert torch.equal(found.tokens, every.tokens)
    assert found.certain.sum() > 15
