import math

import numpy as np
import pytest
import torch

from regpt.errors import UsageError
from regpt.sample.sampling import SamplingOptions, filter_logits, sample

B, V = 3, 17


def random_logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_distribution(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition, token by token: temperature, then the k likeliest, then the nucleus of what is left."""
    p = np.exp(row / temperature) / np.exp(row / temperature).sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[:top_k] if top_k else order
    p = p / sum(p[i] for i in kept)
    nucleus, total = [], 0.0
    for i in kept:
        nucleus.append(i)
        total += p[i]
        if total >= top_p:
            break
    out = np.zeros_like(p)
    for i in nucleus:
        out[i] = p[i] / sum(p[j] for j in nucleus)
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 2, 5, V, V + 10])
@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.9, 1.0])
def test_the_distribution_is_the_definition(temperature, top_k, top_p):
    logits = random_logits()
    got = filter_logits(logits, SamplingOptions(temperature, top_k, top_p)).softmax(-1).numpy()
    for row, expected in zip(got, logits.numpy()):
        np.testing.assert_allclose(row, slow_distribution(expected, temperature, top_k, top_p), rtol=1e-12, atol=1e-15)


def test_draws_have_the_distribution():
    """Frequencies of 20,000 seeded draws lie within four standard deviations, and excluded tokens never come."""
    options, n = SamplingOptions(temperature=1.5, top_k=6, top_p=0.9), 20_000
    row = random_logits()[0]
    expected = slow_distribution(row.numpy(), 1.5, 6, 0.9)
    counts = torch.bincount(sample(row.expand(n, V), options, generator()), minlength=V).numpy()
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts / n - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


def test_nucleus_is_the_fewest_tokens_that_reach_p():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()  # exact in binary
    for p, expected in ((0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 4)):
        kept = filter_logits(logits, SamplingOptions(top_k=0, top_p=p - 1e-12 if p < 1 else p)).isfinite().sum()
        assert kept == expected, p


@pytest.mark.parametrize(("n", "p", "kept"), [(4, 0.25, 1), (4, 0.5, 2), (4, 0.75, 3), (2, 0.5, 1), (8, 0.125, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nucleus_that_is_met_exactly_takes_no_token_more(n, p, kept, dtype):
    """Equal logits, whose probabilities and sums are exact in binary."""
    filtered = filter_logits(torch.zeros(2, n, dtype=dtype), SamplingOptions(top_k=0, top_p=p))
    assert filtered.isfinite().sum(-1).tolist() == [kept, kept]


@pytest.mark.parametrize("top_p", [1e-12, 1e-50, 5e-324])
def test_the_likeliest_token_stays_however_small_the_nucleus(top_p):
    logits = random_logits().float()
    assert torch.equal(sample(logits, SamplingOptions(top_k=0, top_p=top_p), generator()), logits.argmax(-1))


@pytest.mark.parametrize("options", [SamplingOptions(1e300, 0), SamplingOptions(1e-300, 0, 1e-300), SamplingOptions()])
@pytest.mark.parametrize(
    "logits", [torch.tensor([[3e38, -3e38, 0.0]]), torch.tensor([[-3e38, -3e38]]), torch.zeros(1, 1)]
)
def test_the_largest_numbers_of_a_type_can_be_drawn_from(options, logits):
    probs = filter_logits(logits, options).softmax(-1)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1))


def test_ties_keep_exactly_k():
    assert filter_logits(torch.zeros(2, 10), SamplingOptions(top_k=3)).isfinite().sum(-1).tolist() == [3, 3]


def test_greedy_is_argmax_and_draws_nothing():
    logits, source = random_logits(), generator()
    before = source.get_state()
    assert torch.equal(sample(logits, SamplingOptions(top_k=1), source), logits.argmax(-1))
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_temperature_near_zero_is_greedy(temperature):
    logits = random_logits()
    for dtype in (torch.float32, torch.float64):
        drawn = sample(logits.to(dtype), SamplingOptions(temperature, top_k=0), generator())
        assert torch.equal(drawn, logits.argmax(-1))


def test_a_high_temperature_is_uniform():
    probs = filter_logits(random_logits(), SamplingOptions(1e9, top_k=0)).softmax(-1)
    torch.testing.assert_close(probs, torch.full_like(probs, 1 / V), rtol=1e-6, atol=0)


def test_low_precision_logits_are_drawn_from_in_float32():
    logits = random_logits().bfloat16()
    filtered = filter_logits(logits, SamplingOptions(temperature=0.7))
    assert filtered.dtype == torch.float32
    torch.testing.assert_close(filtered.softmax(-1), (logits.float() / 0.7).softmax(-1))


def test_the_seed_decides_and_global_state_is_untouched():
    logits, options, state = random_logits().expand(B, V), SamplingOptions(top_k=0), torch.get_rng_state()
    draws = [torch.stack([sample(logits, options, source) for _ in range(8)]) for source in map(generator, (5, 5, 6))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_logits_given_are_not_changed():
    logits = random_logits()
    sample(logits, SamplingOptions(0.5, 3, 0.5), generator())
    assert torch.equal(logits, random_logits())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "must be above 0 and finite"),
        ({"top_k": -1}, "top-k is -1, must be 0"),
        ({"top_p": 0.0}, "top-p is 0.0, must be above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"top_p": math.nan}, "top-p is nan"),
    ],
)
def test_bad_values_are_one_sentence(values, said):
    with pytest.raises(UsageError, match=said):
        SamplingOptions(**values)
