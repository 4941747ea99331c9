"""AdamW and clipping by hand against torch, the schedule against the lecture's own function."""

import math

import numpy as np
import pytest
import torch

from regpt.errors import UserError
from regpt.reference import adamw

SHAPES = {"matrix": (5, 4), "bias": (4,), "unused": (3, 2)}


def random_tensors(rng):
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def test_ten_updates_are_those_of_torch():
    rng = np.random.default_rng(0)
    params = random_tensors(rng)
    theirs = {name: torch.from_numpy(p.copy()).requires_grad_() for name, p in params.items()}
    groups = [
        {"params": [theirs["matrix"], theirs["unused"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    optimizer = adamw.ReferenceAdamW(params, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for step in range(1, 11):
        grads = random_tensors(rng) | {"unused": np.zeros(SHAPES["unused"])}  # decays, and divides 0 by eps
        for name, p in theirs.items():
            p.grad = torch.from_numpy(grads[name])
        for group in reference.param_groups:
            group["lr"] = 0.01 * step
        reference.step()
        params = optimizer.step(params, grads, 0.01 * step)
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-13, atol=1e-15)


def test_first_update_moves_every_weight_by_the_learning_rate():
    """m̂ = g and v̂ = g² after one update, so the step is lr·sign(g) whatever the size of g."""
    params, grads = {"bias": np.zeros(3)}, {"bias": np.array([1e-3, -1.0, 1e6])}
    updated = adamw.ReferenceAdamW(params, eps=0.0).step(params, grads, 0.5)
    np.testing.assert_allclose(updated["bias"], [-0.5, 0.5, -0.5])
    assert (params["bias"] == 0).all()  # what was passed in is left as it is


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_that_of_torch(max_norm):
    grads = random_tensors(np.random.default_rng(1))
    tensors = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
    for tensor, g in zip(tensors, grads.values()):
        tensor.grad = torch.from_numpy(g.copy())
    expected = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    clipped, norm = adamw.clip_gradients(grads, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-14)
    for tensor, g in zip(tensors, clipped.values()):
        assert tensor.grad is not None
        np.testing.assert_allclose(g, tensor.grad.numpy(), rtol=1e-14)


def lecture_lr(it, max_lr, min_lr, warmup_steps, max_steps):
    """`get_lr` of the lecture's build-nanogpt/train_gpt2.py, which counts updates from 0."""
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it > max_steps:
        return min_lr
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (max_lr - min_lr)


@pytest.mark.parametrize(("warmup", "decay"), [(715, 19073), (0, 7), (3, 4)])
def test_schedule_is_the_lectures_at_every_step(warmup, decay):
    for step in range(1, decay + 10):
        ours = adamw.lr_at(step, lr=6e-4, min_lr=6e-5, warmup_steps=warmup, decay_steps=decay)
        assert ours == pytest.approx(lecture_lr(step - 1, 6e-4, 6e-5, warmup, decay), rel=1e-12)


def test_schedule_without_room_for_a_decay_falls_to_the_minimum():
    assert adamw.lr_at(5, lr=1.0, min_lr=0.1, warmup_steps=4, decay_steps=4) == 0.1


def test_step_zero_is_refused():
    with pytest.raises(UserError, match="counted from 1"):
        adamw.lr_at(0, lr=1.0, min_lr=0.1, warmup_steps=1, decay_steps=2)
