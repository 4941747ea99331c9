"""Derivations by hand against torch's autograd and central differences in float64, at shapes hypothesis chooses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.reference import gpt2, layers, llama
from regpt.reference.flash import flash_attention, flash_attention_backward

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
STEP = 1e-5


def causal(T, window=None):
    return torch.tensor(layers.visible_positions(T, window))


def torch_experts(x, router, *matrices, k=2, norm_topk=True):
    """Every expert on every token, weighted by 0 where it was not chosen."""
    shares = F.linear(x, router).softmax(-1)
    top, chosen = shares.topk(k, dim=-1)
    weights = torch.zeros_like(shares).scatter(1, chosen, top / top.sum(-1, keepdim=True) if norm_topk else top)
    E = len(router)
    each = [(F.silu(x @ matrices[e].T) * (x @ matrices[E + e].T)) @ matrices[2 * E + e].T for e in range(E)]
    return sum(weights[:, e, None] * each[e] for e in range(E))


def expert_weights(router, matrices):
    E, kinds = len(router), ("gate_proj", "up_proj", "down_proj")
    named = {f"{e}.{kind}.weight": matrices[i * E + e] for i, kind in enumerate(kinds) for e in range(E)}
    return {"gate.weight": router} | named


def experts_case(draw, norm_topk):
    E, N, C, inner = draw(st.integers(1, 4)), draw(st.integers(1, 5)), 4, 3
    k = draw(st.integers(1, E))

    def forward(x, router, *matrices):
        return layers.experts(x, expert_weights(router, matrices), k, norm_topk)

    def backward(dy, saved):
        dx, grads = layers.experts_backward(dy, saved)
        return dx, *(grads[name] for name in expert_weights(*[[0] * E, [0] * 3 * E]))

    shapes = [(N, C), (E, C), *[(inner, C)] * (2 * E), *[(C, inner)] * E]
    return forward, backward, lambda *w: torch_experts(*w, k=k, norm_topk=norm_topk), shapes


def attention_case(draw):
    B, G, T, D = (draw(st.integers(1, most)) for most in (2, 2, 6, 4))
    H, window = G * draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 6))
    documents = np.sort(
        np.array(draw(st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T))).reshape(B, T), axis=1
    )
    rate = draw(st.sampled_from([0.0, 0.5]))
    kept = (np.random.default_rng(5).random((B, H, T, T)) >= rate) / (1 - rate) if rate else None
    seen = layers.visible_positions(T, window, documents)

    def by_torch(q, k, v):
        k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~torch.tensor(seen), -torch.inf)
        return (scores.softmax(-1) * (1 if kept is None else torch.tensor(kept))) @ v

    forward = lambda q, k, v: layers.masked_attention(q, k, v, seen, kept)  # noqa: E731
    return forward, layers.masked_attention_backward, by_torch, [(B, H, T, D), (B, G, T, D), (B, G, T, D)]


def flash_case(draw):
    T, D, tile = (draw(st.integers(1, most)) for most in (9, 4, 5))

    def by_torch(q, k, v):
        return F.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)), is_causal=True)[0, 0]

    forward = lambda q, k, v: flash_attention(q, k, v, tile)  # noqa: E731
    return forward, lambda dy, saved: flash_attention_backward(dy, saved, tile), by_torch, [(T, D)] * 3


def lora_case(draw):
    N, i, o, r = (draw(st.integers(1, most)) for most in (4, 5, 4, 3))
    w = np.random.default_rng(6).normal(size=(o, i))
    forward = lambda x, a, b: layers.lora(x, w, a, b, 0.7)  # noqa: E731
    return (
        forward,
        layers.lora_backward,
        lambda x, a, b: x @ (torch.tensor(w) + 0.7 * b @ a).T,
        [(N, i), (r, i), (o, r)],
    )


def elementwise(forward, backward, by_torch):
    def case(draw):
        return forward, backward, by_torch, [(draw(st.integers(1, 3)), draw(st.integers(1, 7)))]

    return case


def rows_with_weights(forward, backward, by_torch, *, bias):
    def case(draw):
        n = draw(st.integers(2, 6))
        return forward, backward, by_torch, [(draw(st.integers(1, 3)), n), (n,), *([(n,)] if bias else [])]

    return case


def linear_case(draw):
    N, i, o = (draw(st.integers(1, 5)) for _ in range(3))
    return gpt2.linear, gpt2.linear_backward, F.linear, [(N, i), (o, i), (o,)]


def swiglu_case(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return llama.swiglu, llama.swiglu_backward, lambda gate, up: F.silu(gate) * up, [shape, shape]


def rotary_case(draw):
    B, H, T, half = (draw(st.integers(1, most)) for most in (2, 2, 5, 3))
    by = llama.rotation(T, 2 * half)

    def by_torch(x):
        pairs = torch.complex(*x.split(half, dim=-1)) * torch.polar(
            torch.ones(T, half, dtype=torch.float64), torch.atan2(*(torch.tensor(y) for y in by[::-1]))
        )
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    return lambda x: llama.rotate(x, by), llama.rotate_backward, by_torch, [(B, H, T, 2 * half)]


def dropout_case(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kept = np.random.default_rng(7).random(shape) < 0.7
    forward = lambda x: layers.dropout(x, kept, 0.3)  # noqa: E731
    return forward, layers.dropout_backward, lambda x: x * torch.tensor(kept) / 0.7, [shape]


CASES = {
    "linear": linear_case,
    "layer_norm": rows_with_weights(
        gpt2.layer_norm, gpt2.layer_norm_backward, lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5), bias=True
    ),
    "rms_norm": rows_with_weights(
        lambda x, w: llama.rms_norm(x, w, 1e-5),
        llama.rms_norm_backward,
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        bias=False,
    ),
    "gelu": elementwise(gpt2.gelu, gpt2.gelu_backward, lambda x: F.gelu(x, approximate="tanh")),
    "gelu_exact": elementwise(layers.gelu_exact, layers.gelu_exact_backward, F.gelu),
    "relu_squared": elementwise(layers.relu_squared, layers.relu_squared_backward, lambda x: F.relu(x) ** 2),
    "swiglu": swiglu_case,
    "log_softmax": elementwise(layers.log_softmax, layers.log_softmax_backward, lambda x: F.log_softmax(x, -1)),
    "rotary": rotary_case,
    "attention": attention_case,
    "flash attention": flash_case,
    "dropout": dropout_case,
    "experts": lambda draw: experts_case(draw, norm_topk=True),
    "experts, shares as they are": lambda draw: experts_case(draw, norm_topk=False),
    "lora": lora_case,
}


@pytest.mark.parametrize("name", CASES)
@SETTINGS
@given(data=st.data())
def test_a_layer_and_its_derivative_by_hand_are_those_of_autograd_and_of_differences(name, data):
    forward, backward, by_torch, shapes = CASES[name](data.draw)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    inputs = [rng.normal(size=shape) for shape in shapes]
    y, saved = forward(*inputs)
    dy = rng.normal(size=y.shape)
    by_hand = backward(dy, saved)
    by_hand = by_hand if isinstance(by_hand, tuple) else (by_hand,)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = by_torch(*tensors)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-11, atol=1e-12)
    by_autograd = torch.autograd.grad(expected, tensors, torch.tensor(dy), materialize_grads=True)
    assert len(by_hand) == len(by_autograd)
    for i, (x, grad, other) in enumerate(zip(inputs, by_hand, by_autograd)):
        np.testing.assert_allclose(grad, other.numpy(), rtol=1e-9, atol=1e-11)
        way = rng.normal(size=x.shape)
        up, down = ((forward(*inputs[:i], x + h * way, *inputs[i + 1 :])[0] * dy).sum() for h in (STEP, -STEP))
        assert (grad * way).sum() == pytest.approx((up - down) / (2 * STEP), rel=1e-5, abs=1e-6)


@SETTINGS
@given(data=st.data())
def test_cross_entropy_and_its_derivative_are_those_of_autograd_with_extreme_logits_and_missing_targets(data):
    B, T, V = (data.draw(st.integers(1, most)) for most in (2, 3, 5))
    size = data.draw(st.sampled_from([1e-3, 1.0, 300.0]))
    rng = np.random.default_rng(8)
    logits, targets = rng.normal(size=(B, T, V)) * size, rng.integers(-1, V, size=(B, T))
    targets[targets < 0] = gpt2.IGNORE_INDEX
    loss, saved = gpt2.cross_entropy(logits, targets, 0.5)
    z = torch.tensor(logits, requires_grad=True)
    expected = 0.5 * F.cross_entropy(z.flatten(0, 1), torch.tensor(targets).flatten(), reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(
        gpt2.cross_entropy_backward(saved), torch.autograd.grad(expected, z)[0].numpy(), rtol=1e-9, atol=1e-12
    )


def test_dpo_by_hand_is_that_of_autograd_and_log_2_at_the_reference():
    rng = np.random.default_rng(9)
    chosen, rejected, *reference = rng.normal(size=(4, 5)) * 30
    loss, saved = layers.dpo_loss(chosen, rejected, tuple(reference), 0.1)
    a, b = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    expected = -F.logsigmoid(0.1 * ((a - torch.tensor(reference[0])) - (b - torch.tensor(reference[1])))).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for by_hand, by_autograd in zip(layers.dpo_loss_backward(saved), torch.autograd.grad(expected, (a, b))):
        np.testing.assert_allclose(by_hand, by_autograd.numpy(), rtol=1e-10)
    assert layers.dpo_loss(*reference, tuple(reference), 0.1)[0] == pytest.approx(math.log(2), rel=1e-15)


def test_softmax_without_its_maximum_breaks_where_the_stable_one_does_not():
    small, large = np.array([1.0, 2.0, 3.0]), np.array([1000.0, 1001.0, 1002.0])
    np.testing.assert_allclose(layers.naive_softmax(small), gpt2.softmax(small), rtol=1e-15)
    assert np.isnan(layers.naive_softmax(large)).all()
    np.testing.assert_allclose(gpt2.softmax(large), gpt2.softmax(small), rtol=1e-14)
    assert np.isnan(layers.naive_softmax(-large)).all()
    assert np.isfinite(layers.log_softmax(np.array([2000.0, 0.0]))[0]).all()


def test_dropout_after_the_softmax_keeps_the_expectation():
    q, k, v = np.random.default_rng(10).normal(size=(3, 1, 1, 4, 3))
    seen, total = layers.visible_positions(4), 0
    for bits in range(2**4):  # every mask of the last query's weights, at rate 1/2
        kept = np.ones((1, 1, 4, 4))
        kept[..., 3, :] = [2.0 * (bits >> i & 1) for i in range(4)]
        total = total + layers.masked_attention(q, k, v, seen, kept)[0][0, 0, 3] / 2**4
    np.testing.assert_allclose(total, layers.masked_attention(q, k, v, seen)[0][0, 0, 3], rtol=1e-12)


def test_a_token_sees_its_window_and_its_document_only():
    seen = layers.visible_positions(5, 2, np.array([[0, 0, 1, 1, 1]]))[0, 0]
    assert [np.flatnonzero(row).tolist() for row in seen] == [[0], [0, 1], [2], [2, 3], [3, 4]]
