"""Stochastic rounding: unbiased, exact where it may be, the same wherever it is computed; and what nearest loses."""

import math

import pytest
import torch
from torch import Tensor

import tiny
from regpt.model.dropout import mix
from regpt.train.rounding import Moment, key_of, numbers_of, round_stochastically, update

BF16 = torch.bfloat16


def words(n: int, key: int) -> Tensor:
    return mix(torch.arange(n) ^ key)


@pytest.mark.parametrize("value", [1.003, -1.003, 3e-5, -7.77e8, 1e-39, 1.99609375 + 2**-10])
def test_the_mean_of_many_roundings_is_the_number(value: float):
    """Two neighbours, and their mean within four standard errors of the number; to nearest it is not."""
    n = 1 << 18
    x = torch.full((n,), value)
    rounded = round_stochastically(x, words(n, 12345)).double()
    exact = float(x[0])
    low, high = rounded.min().item(), rounded.max().item()
    assert low < exact < high
    assert {low, high} == {v.item() for v in rounded.unique()}
    share = (exact - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / n)
    assert abs(rounded.mean().item() - exact) < 4 * error
    assert abs(x.to(BF16).double().mean().item() - exact) > 4 * error


def test_what_bfloat16_holds_is_never_moved():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)  # all bit patterns
    rounded = round_stochastically(every.float(), torch.full((2**16,), 0xFFFF))
    finite = ~every.isnan()
    assert rounded[finite].view(torch.int16).equal(every[finite].view(torch.int16))
    assert rounded[~finite].isnan().all()


def test_bits_of_updates_and_parameters_are_independent():
    """Neighbouring elements, updates and names: correlations within four standard errors of nothing."""
    n = 1 << 16
    draws = [words(n, key_of(7, step, name)) for step in (1, 2) for name in ("h.0.weight", "h.1.weight")]
    draws += [draws[0].roll(1), mix(draws[0] ^ 0x9E3779B9), draws[0] >> 16]
    low = torch.stack([(draw & 0xFFFF).double() for draw in draws])
    off = torch.corrcoef(low) - torch.eye(len(draws))
    assert off.abs().max() < 4 / math.sqrt(n)
    assert len({key_of(seed, step, "a") for seed in range(20) for step in range(50)}) == 1000


GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def updated(
    p: Tensor, grads: list[Tensor], state_dtype: torch.dtype, *, seed: int = 0, pieces: int = 1
) -> list[Tensor]:
    first, second = (torch.zeros(len(p), dtype=state_dtype) for _ in range(2))
    for step, grad in enumerate(grads, start=1):
        numbers, key = torch.tensor(numbers_of(GROUP, step)), torch.tensor(key_of(seed, step, "p"))
        size = math.ceil(len(p) / pieces)
        for start in range(0, len(p), size):
            mine = slice(start, start + size)
            update(p[mine], grad[mine], Moment(first[mine]), Moment(second[mine]), numbers, key, start)
    return [p, first, second]


def test_in_float32_it_is_torchs_adamw():
    grads = [torch.randn(100, generator=torch.Generator().manual_seed(step)) for step in range(5)]
    theirs = torch.linspace(-1, 1, 100).requires_grad_()
    ours = updated(theirs.detach().clone(), grads, torch.float32)
    optimizer = torch.optim.AdamW([theirs], **GROUP)
    for grad in grads:
        theirs.grad = grad
        optimizer.step()
    state = optimizer.state[theirs]
    for mine, other in zip(ours, (theirs.detach(), state["exp_avg"], state["exp_avg_sq"])):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2**-24)


def test_small_updates_arrive_in_bfloat16_on_average_and_stall_to_nearest():
    """A gradient of one sign moves a weight of 1 by 1e-3 an update: below half of the last digit, 2⁻⁸."""
    n, steps, group = 4096, 100, GROUP | {"weight_decay": 0.0}
    p, first, second = torch.ones(n, dtype=BF16), torch.zeros(n), torch.zeros(n)
    nearest = torch.ones(n, dtype=BF16)
    for step in range(1, steps + 1):
        numbers, key = torch.tensor(numbers_of(group, step)), torch.tensor(key_of(0, step, "p"))
        update(p, torch.ones(n), Moment(first), Moment(second), numbers, key, 0)
        nearest = (nearest.float() - 1e-3).to(BF16)
    assert nearest.float().mean() == 1.0
    moved = 1 - p.double()
    error = moved.std().item() / math.sqrt(n)
    assert moved.mean().item() == pytest.approx(steps * 1e-3, abs=4 * error)


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_second_moments_in_bfloat16_decay_as_they_should(beta2: float):
    """After gradients have stopped. To nearest, a share of 1 - beta2 = 0.001 is below half of the last digit: nothing
    decays, for ever."""
    n, steps, group = 4096, 300, GROUP | {"betas": (0.9, beta2), "lr": 0.0}
    first, second = torch.zeros(n, dtype=BF16), torch.full((n,), 1.5, dtype=BF16)
    nearest = second.clone()
    for step in range(1, steps + 1):
        numbers, key = torch.tensor(numbers_of(group, step)), torch.tensor(key_of(3, step, "p"))
        update(torch.ones(n), torch.zeros(n), Moment(first), Moment(second), numbers, key, 0)
        nearest = (nearest.float() * beta2).to(BF16)
    exact = 1.5 * beta2**steps
    error = second.double().std().item() / math.sqrt(n)
    assert second.double().mean().item() == pytest.approx(exact, abs=4 * error + 1e-3 * exact)
    if beta2 == 0.999:
        assert nearest.eq(1.5).all()


def test_pieces_have_the_bits_of_the_whole():
    grads = [torch.randn(1000, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    start = torch.linspace(-1, 1, 1000).to(BF16)
    whole, cut = (updated(start.clone(), grads, BF16, pieces=pieces) for pieces in (1, 7))
    other = updated(start.clone(), grads, BF16, seed=1)
    assert all(a.equal(b) for a, b in zip(whole, cut))
    assert not any(a.equal(b) for a, b in zip(whole, other))


@tiny.IMPORTS_COMPILER
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_rounds_with_the_same_bits():
    """Weights differ where the compiler's float32 differs in its last digit, which is hardly anywhere."""
    torch.compiler.reset()
    grad = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    numbers, key = torch.tensor(numbers_of(GROUP, 3)), torch.tensor(key_of(0, 3, "p"))
    found = []
    for function in (update, torch.compile(update, dynamic=True)):
        p, first, second = (torch.linspace(low, 1, 5000).to(BF16) for low in (-1, -0.1, 0.01))
        for part in (slice(0, 3000), slice(3000, 5000)):
            function(p[part], grad[part], Moment(first[part]), Moment(second[part]), numbers, key, part.start)
        found.append((p, first, second))
    for ours, theirs in zip(*found):
        assert (ours != theirs).double().mean() < 2e-3
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_it_rounds_with_the_same_bits():
    torch.compiler.reset()
    n = 1 << 20
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0))
    numbers, key = torch.tensor(numbers_of(GROUP, 3)), torch.tensor(key_of(0, 3, "p"))
    found = []
    for device, function in (("cpu", update), ("cuda", torch.compile(update, dynamic=True))):
        p, first, second = (torch.linspace(low, 1, n).to(BF16).to(device) for low in (-1, -0.1, 0.01))
        given = [x.to(device) for x in (grad, numbers, key)]
        for part in (slice(0, n // 2), slice(n // 2, n)):
            moments = Moment(first[part]), Moment(second[part])
            function(p[part], given[0][part], *moments, *given[1:], part.start)
        found.append([x.cpu() for x in (p, first, second)])
    for ours, theirs in zip(*found):
        assert (ours != theirs).double().mean() < 2e-3
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
