"""Counter-based noise: a function of seed, position and token, uniform and independent."""

import math

import numpy as np
import pytest
import torch

from regpt.engine.noise import choice_seed, gumbel, logarithm, random_bits, split_seeds
from regpt.errors import UsageError

TOKENS = torch.arange(20_000)


def bits(seed: int, position: int, tokens: torch.Tensor = TOKENS) -> np.ndarray:
    return random_bits(split_seeds([seed]), torch.tensor([position]), tokens)[0].numpy()


def murmur(x: int) -> int:
    """MurmurHash3's finalizer in Python's integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize(("seed", "position", "token"), [(0, 0, 0), (1337, 5, 50256), (2**64 - 1, 1023, 7)])
def test_the_bits_are_those_of_the_definition(seed, position, token):
    """Fixed for good: seeds that users keep must give the same texts in the next version."""
    low, high = seed % 2**32, seed >> 32
    at = murmur((position * 0x9E3779B1 + 0x5851F42D) % 2**32)
    first = murmur((murmur(low ^ at) + high) % 2**32)
    second = murmur((murmur(high ^ 0xA511E9B3) + (low ^ murmur(at ^ 0x2545F491))) % 2**32)
    expected = murmur((murmur((token * 0x9E3779B1 % 2**32) ^ first) + second) % 2**32)
    assert bits(seed, position, torch.tensor([token])).item() == expected


def test_a_row_of_a_batch_has_the_noise_it_has_alone():
    seeds, positions = [3, 2**40, 3], torch.tensor([0, 9, 1])
    together = gumbel(split_seeds(seeds), positions, TOKENS)
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        assert torch.equal(together[row], gumbel(split_seeds([seed]), position[None], TOKENS)[0])
    some = torch.tensor([[5, 1], [0, 7], [2, 2]])
    assert torch.equal(gumbel(split_seeds(seeds), positions, some), together.gather(1, some))


@pytest.mark.parametrize("other", [(1, 0), (2**32, 0), (0, 1)])
def test_bits_of_neighbouring_seeds_and_positions_differ_in_half_of_their_places(other):
    flips = np.unpackbits((bits(0, 0) ^ bits(*other)).astype("<u4").view(np.uint8)).reshape(-1, 32)
    # 20,000 flips of a coin: 4.5 standard deviations, for each of 32 bits
    assert np.all(np.abs(flips.mean(0) - 0.5) < 4.5 * 0.5 / math.sqrt(len(flips)))


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_is_uniform_and_uncorrelated_along_tokens_positions_and_seeds(along):
    n = 20_000
    count, same = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    seeds = torch.stack((count if along == "seeds" else same + 7, same), dim=1)
    found = random_bits(seeds, count if along == "positions" else same, (count if along == "tokens" else same)[:, None])
    u = (found[:, 0].numpy() + 0.5) / 2**32
    squares = ((np.histogram(u, 256, (0, 1))[0] - n / 256) ** 2 / (n / 256)).sum()
    assert squares < 255 + 5 * math.sqrt(2 * 255)  # chi-square with 255 degrees of freedom
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4.5 / math.sqrt(n)


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov against exp(-exp(-x)): D √n is below 1.95 with probability 0.999."""
    x = np.sort(gumbel(split_seeds([1]), torch.tensor([0]), TOKENS)[0].double().numpy())
    cdf = np.exp(-np.exp(-x))
    distance = np.abs(cdf - (np.arange(len(x)) + 0.5) / len(x)).max()
    assert distance * math.sqrt(len(x)) < 1.95


def test_the_logarithm_is_that_of_mathematics():
    x = torch.cat((torch.logspace(-300, 300, 5001, dtype=torch.float64), 1 - torch.logspace(-12, -1, 99).double()))
    assert (logarithm(x) - x.log()).abs().max() < 1e-9
    ends = torch.tensor([0.5, 2**32 - 0.5], dtype=torch.float64) * 2.0**-32
    assert logarithm(logarithm(ends).neg()).isfinite().all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_of_more_than_64_bits_is_a_usage_error(seed):
    with pytest.raises(UsageError, match=f"seed is {seed}, must be between 0"):
        split_seeds([seed])


def test_the_first_choice_has_the_seed_itself():
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(2**64 - 1, n) for n in range(100)}) == 100


@pytest.mark.gpu
def test_the_gpu_has_the_same_noise():
    seeds, positions = split_seeds([0, 2**63 + 5]), torch.tensor([0, 1000])
    expected = gumbel(seeds, positions, torch.arange(200_000))
    found = gumbel(seeds.cuda(), positions.cuda(), torch.arange(200_000).cuda()).cpu()
    assert torch.equal(found, expected)
