"""Each layer's derivative against finite differences in float64."""

import numpy as np
import pytest

from regpt.reference import gpt2

B, T, C, H, V = 2, 5, 12, 3, 11
STEP = 1e-5  # central differences: error of the order of STEP² and of rounding / STEP, both near 1e-10


def gradients_by_both_ways(forward, backward, inputs, rng):
    """Pairs (by the backward function, by finite differences) of d<y, dy>/d(input) along a random direction."""
    y, saved = forward(*inputs)
    dy = rng.normal(size=y.shape)
    grads = backward(dy, saved)
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert len(grads) == len(inputs)
    for i, (x, grad) in enumerate(zip(inputs, grads)):
        assert grad.shape == x.shape
        direction = rng.normal(size=x.shape)
        around = [(forward(*inputs[:i], x + h * direction, *inputs[i + 1 :])[0] * dy).sum() for h in (STEP, -STEP)]
        yield (grad * direction).sum(), (around[0] - around[1]) / (2 * STEP)


HEADS = (B, H, T, C // H)
IDX = np.array([[1, 4, 4, 0, 10], [4, 2, 1, 1, 4]])  # repeated tokens, and tokens that do not occur
LAYERS = {
    "linear": (gpt2.linear, gpt2.linear_backward, [(B, T, C), (7, C), (7,)]),
    "layer_norm": (gpt2.layer_norm, gpt2.layer_norm_backward, [(B, T, C), (C,), (C,)]),
    "gelu": (gpt2.gelu, gpt2.gelu_backward, [(B, T, C)]),
    "attention": (gpt2.causal_attention, gpt2.attention_backward, [HEADS, HEADS, HEADS]),
    "head": (gpt2.head, gpt2.head_backward, [(B, T, C), (V, C)]),
    "embedding": (lambda *w: gpt2.embedding(IDX, *w), gpt2.embedding_backward, [(V, C), (T + 2, C)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_backward_of_a_layer_agrees_with_finite_differences(name):
    forward, backward, shapes = LAYERS[name]
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=shape) for shape in shapes]
    for by_hand, by_differences in gradients_by_both_ways(forward, backward, inputs, rng):
        assert by_hand == pytest.approx(by_differences, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", ["self_attention", "mlp", "block"])
def test_backward_of_a_part_with_named_weights_agrees_with_finite_differences(name):
    prefix = {"self_attention": "h.0.attn.", "mlp": "h.0.mlp.", "block": "h.0."}[name]
    extra = () if name == "mlp" else (H,)
    rng = np.random.default_rng(1)
    shapes = gpt2.parameter_shapes(1, C, V, T)
    weights = {key: rng.normal(size=shape) * 0.3 for key, shape in shapes.items()}
    weights = gpt2.inside(prefix, weights)

    def forward(x, *values):
        return getattr(gpt2, name)(x, dict(zip(weights, values)), *extra)

    def backward(dy, saved):
        dx, grads = getattr(gpt2, name + "_backward")(dy, saved)
        assert grads.keys() == weights.keys()
        return (dx, *(grads[key] for key in weights))

    inputs = [rng.normal(size=(B, T, C)), *weights.values()]
    for by_hand, by_differences in gradients_by_both_ways(forward, backward, inputs, rng):
        assert by_hand == pytest.approx(by_differences, rel=1e-7, abs=1e-7)


def test_backward_of_the_loss_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    logits, direction = rng.normal(size=(2, B, T, V))
    targets = np.where(rng.random((B, T)) < 0.3, gpt2.IGNORE_INDEX, rng.integers(V, size=(B, T)))
    grad = gpt2.cross_entropy_backward(gpt2.cross_entropy(logits, targets, 0.25)[1])
    up, down = (gpt2.cross_entropy(logits + h * direction, targets, 0.25)[0] for h in (STEP, -STEP))
    assert (grad * direction).sum() == pytest.approx((up - down) / (2 * STEP), rel=1e-8)
    assert (grad[targets == gpt2.IGNORE_INDEX] == 0).all()


def test_loss_of_huge_logits_does_not_overflow():
    logits = np.array([[[1e4, -1e4, 0.0]]])
    assert gpt2.cross_entropy(logits, np.array([[1]]), 1.0)[0] == 2e4


def test_splitting_heads_is_undone_by_merging_them():
    x = np.random.default_rng(3).normal(size=(B, T, C))
    assert (gpt2.merge_heads(gpt2.split_heads(x, H)) == x).all()


def test_a_later_token_changes_no_earlier_output():
    q, k, v = np.random.default_rng(4).normal(size=(3, *HEADS))
    before = gpt2.causal_attention(q, k, v)[0]
    k[:, :, -1], v[:, :, -1] = 7.0, -7.0
    after = gpt2.causal_attention(q, k, v)[0]
    assert (before[:, :, :-1] == after[:, :, :-1]).all()
    assert (before[:, :, -1] != after[:, :, -1]).all()
