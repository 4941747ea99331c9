"""The plain operations against float64 formulas written out from their sources."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from regpt.model.families import make_model
from regpt.model.ops import (
    IGNORE_INDEX,
    PLAIN,
    attention,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
)
from regpt.model.weights import load_weights, state_tensors


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, may_look) -> Tensor:
    """Vaswani et al. 2017, eq. 1, one query after the other; `may_look(b, t, s)` says what a query sees."""
    out = torch.zeros_like(q)
    for b, h, t in [(b, h, t) for b in range(q.size(0)) for h in range(q.size(1)) for t in range(q.size(2))]:
        seen = [s for s in range(k.size(2)) if may_look(b, t, s)]
        scores = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(q.size(-1)) for s in seen])
        weights = scores.exp() / scores.exp().sum()
        out[b, h, t] = sum(w * v[b, h, s] for w, s in zip(weights, seen))
    return out


@pytest.mark.parametrize(("T", "S"), [(6, 6), (1, 1), (1, 6), (3, 6), (5, 6)])
def test_attention_is_causal_also_when_the_queries_are_the_last_of_the_keys(T: int, S: int):
    q, k, v = drawn(2, 3, T, 4, seed=1), drawn(2, 3, S, 4, seed=2), drawn(2, 3, S, 4, seed=3)
    expected = attention_by_hand(q, k, v, lambda b, t, s: s <= S - T + t)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_attention_sees_the_keys_that_a_mask_allows():
    q, k, v = (drawn(2, 3, 5, 4, seed=seed) for seed in range(3))
    mask = drawn(2, 1, 5, 5, seed=4) > 0
    mask |= torch.eye(5, dtype=torch.bool)  # every query sees something
    expected = attention_by_hand(q, k, v, lambda b, t, s: bool(mask[b, 0, t, s]))
    torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_is_the_papers():
    x, weight, bias = 3 * drawn(2, 5, 7) + 2, drawn(7, seed=1), drawn(7, seed=2)
    mean = x.sum(-1, keepdim=True) / 7
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / 7
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-12, atol=1e-12)


def test_gelu_is_the_tanh_form_and_not_the_exact_one():
    xs = [-4.0, -1.0, -0.3, 0.0, 0.5, 2.0, 6.0]
    tanh_form = [0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in xs]
    exact = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in xs]
    given = gelu(torch.tensor(xs, dtype=torch.float64)).tolist()
    assert given == pytest.approx(tanh_form, rel=1e-12, abs=1e-14)
    assert given != pytest.approx(exact, rel=1e-5, abs=1e-5)


def cross_entropy_by_hand(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, target in zip(hidden, targets.tolist()):
        if target != IGNORE_INDEX:
            logits = weight[:n_vocab] @ x
            total = total + torch.log(logits.exp().sum()) - logits[target]
    return total


@pytest.mark.parametrize("n_vocab", [11, 16], ids=["padded", "not padded"])
def test_linear_cross_entropy_sums_over_valid_targets_and_real_tokens(n_vocab: int):
    hidden, weight = drawn(9, 4).requires_grad_(), drawn(16, 4, seed=1).requires_grad_()  # padding rows are not zero
    targets = torch.randint(n_vocab, (9,), generator=torch.Generator().manual_seed(2))
    targets[[1, 4, 5]] = IGNORE_INDEX
    given = linear_cross_entropy(hidden, weight, targets, n_vocab)
    expected = cross_entropy_by_hand(hidden, weight, targets, n_vocab)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(given, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert ours.isfinite().all()
    assert (torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, n_vocab), weight)[0][n_vocab:] == 0).all()


def test_without_a_valid_target_the_loss_and_its_gradients_are_zero():
    hidden, weight = drawn(3, 4).requires_grad_(), drawn(16, 4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), IGNORE_INDEX), 11)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_the_loss_of_bfloat16_is_computed_in_float32():
    hidden, weight = drawn(9, 4, dtype=torch.bfloat16), drawn(16, 4, seed=1, dtype=torch.bfloat16)
    targets = torch.arange(9)
    loss = linear_cross_entropy(hidden, weight, targets, 11)
    assert loss.dtype == torch.float32
    logits = (hidden @ weight.t()).double()[:, :11]  # rounded to bfloat16 once, by the product
    expected = (logits.exp().sum(1).log() - logits[range(9), targets]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_plain_ops_are_the_functions_of_this_file():
    ours = (PLAIN.attention, PLAIN.layer_norm, PLAIN.gelu, PLAIN.linear, PLAIN.linear_cross_entropy)
    assert ours == (attention, layer_norm, gelu, linear, linear_cross_entropy)


def test_another_norm_is_one_function():
    """RMSNorm with a bias in the place of LayerNorm, as docs/architecture.md has it: nothing else is touched."""

    def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps) + bias

    model = make_model(tiny.CONFIG, replace(PLAIN, layer_norm=rms_norm)).double()
    load_weights(model, state_tensors(tiny.build_model()))
    idx, _ = tiny.Rows().rows(0)
    assert not torch.allclose(model(idx), tiny.build_model()(idx))
    trainer = tiny.build_trainer(model, tiny.Rows())
    first, last = [tiny.update(trainer)["loss"] for _ in range(20)][::19]
    assert last < first
