"""Optimizers, schedules, accumulation and the character model by hand, against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import tiny

from regpt.model.layers import rotation
from regpt.model.weights import state_tensors, unpadded
from regpt.reference import adamw, char_model, gpt2, llama, optimizers

TORCH = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
}


def surface(p):
    """A loss with a minimum, curved differently in each direction, of a matrix (3, 4)."""
    scale = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    return (scale * (p - 1) ** 2).sum() / 10 + torch.sin(3 * p).sum() / 5


def hundred_steps(name, lr, **options):
    """A parameter after 100 updates by hand, its gradients by autograd."""
    p, state = np.zeros((3, 4)), {}
    for step in range(1, 101):
        tensor = torch.tensor(p, requires_grad=True)
        g = torch.autograd.grad(surface(tensor), tensor)[0].numpy()
        p, state = optimizers.RULES[name](p, g, state, step, lr, **options)
    return p


@pytest.mark.parametrize("name", TORCH)
def test_hundred_updates_by_hand_are_those_of_torch(name):
    kind, options = TORCH[name]
    p = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = kind([p], lr=0.02, **options)
    for _ in range(100):
        optimizer.zero_grad()
        surface(p).backward()
        optimizer.step()
    np.testing.assert_allclose(hundred_steps(name, 0.02), p.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_lion_moves_every_weight_by_the_rate_and_decays_it():
    p, g = np.array([[1.0, -2.0]]), np.array([[0.3, -4.0]])
    first, state = optimizers.lion(p, g, {}, 1, 0.1, decay=0.5)
    np.testing.assert_allclose(first, [[1 * 0.95 - 0.1, -2 * 0.95 + 0.1]], rtol=1e-15)
    np.testing.assert_allclose(state["m"], 0.01 * g, rtol=1e-12)
    # The old mean and the new gradient disagree in the first weight: 0.9 of a mean of 0.003 against 0.1 of -0.02.
    second, state = optimizers.lion(first, np.array([[-0.02, 1.0]]), state, 2, 0.1)
    np.testing.assert_allclose(second, first - 0.1, rtol=1e-12)
    np.testing.assert_allclose(state["m"], [[0.99 * 0.003 - 0.01 * 0.02, 0.99 * -0.04 + 0.01]], rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (8, 3), (5, 5)])
def test_newton_schulz_is_the_polynomial_of_each_singular_value(shape):
    g = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    a, b, c = 3.4445, -4.7750, 2.0315
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(optimizers.newton_schulz(g), u @ np.diag(s) @ vt, rtol=1e-9, atol=1e-12)
    assert s.min() > 0.6
    assert s.max() < 1.2


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_by_hand_is_that_of_torch_up_to_its_bfloat16(shape):
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(5, *shape))
    p, state = rng.normal(size=shape), {}
    parameter = torch.nn.Parameter(torch.tensor(p))
    optimizer = torch.optim.Muon([parameter], lr=0.02, momentum=0.95, weight_decay=0.1)
    for step, g in enumerate(grads, 1):
        p, state = optimizers.muon(p, g, state, step, 0.02, decay=0.1)
        parameter.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(
        p, parameter.detach().numpy(), atol=0.02 * 5 * 0.05
    )  # 5 updates, singular values 5 % apart


def test_mini_batches_are_each_example_once_and_their_mean_gradient_is_the_whole_one():
    rng = np.random.default_rng(2)
    x, y, w = rng.normal(size=(10, 3)), rng.normal(size=10), rng.normal(size=3)
    gradient = lambda rows: 2 * (x[rows] @ w - y[rows]) @ x[rows] / len(rows)  # noqa: E731
    for size in (1, 4, 10):
        batches = list(optimizers.mini_batches(10, size, rng))
        assert sorted(np.concatenate(batches).tolist()) == list(range(10))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        mean = sum(len(batch) * gradient(batch) for batch in batches) / 10
        np.testing.assert_allclose(mean, gradient(np.arange(10)), rtol=1e-12)


def test_accumulation_divides_by_all_targets_and_the_mean_of_means_is_another_number():
    values = np.random.default_rng(3).normal(size=10)
    parts = values[:7], values[7:]
    sums, counts = [part.sum() for part in parts], [7, 3]
    assert optimizers.accumulated(sums, counts) == pytest.approx(values.mean(), rel=1e-14)
    assert abs(optimizers.accumulated_wrongly(sums, counts) - values.mean()) > 0.01
    assert optimizers.accumulated_wrongly([values[:5].sum(), values[5:].sum()], [5, 5]) == pytest.approx(values.mean())


def test_the_trapezoid_rises_stays_and_falls_to_its_last_update():
    factors = [optimizers.trapezoid(step, steps=10, warmup_steps=2, decay_steps=4) for step in range(1, 11)]
    np.testing.assert_allclose(factors, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert optimizers.trapezoid(11, steps=10, warmup_steps=2, decay_steps=4) == 0
    rates = [optimizers.inverse_sqrt(step, warmup_steps=4) for step in (1, 4, 16)]
    np.testing.assert_allclose(rates, [0.25, 1, 0.5])


def test_every_intermediate_gradient_of_the_character_model_is_that_of_autograd():
    rng = np.random.default_rng(4)
    p = char_model.char_parameters(rng)
    idx, targets = rng.integers(27, size=(32, 3)), rng.integers(27, size=32)
    values = char_model.char_forward(p, idx, targets)
    grads, by_hand = char_model.char_backward(p, values)

    t = {name: torch.tensor(array, requires_grad=True) for name, array in p.items()}
    v = {"emb": t["table"][torch.tensor(idx)]}
    v["x"] = v["emb"].view(32, -1)
    v["pre"] = v["x"] @ t["w1"] + t["b1"]
    v["mean"] = v["pre"].mean(0, keepdim=True)
    v["diff"] = v["pre"] - v["mean"]
    v["square"] = v["diff"] ** 2
    v["var"] = v["square"].sum(0, keepdim=True) / 31
    v["inv"] = (v["var"] + 1e-5) ** -0.5
    v["norm"] = v["diff"] * v["inv"]
    v["act"] = t["gain"] * v["norm"] + t["bias"]
    v["h"] = torch.tanh(v["act"])
    v["logits"] = v["h"] @ t["w2"] + t["b2"]
    v["top"] = v["logits"].max(1, keepdim=True).values
    v["shifted"] = v["logits"] - v["top"]
    v["counts"] = v["shifted"].exp()
    v["total"] = v["counts"].sum(1, keepdim=True)
    v["total_inv"] = v["total"] ** -1
    v["probs"] = v["counts"] * v["total_inv"]
    v["logprobs"] = v["probs"].log()
    for value in v.values():
        value.retain_grad()
    loss = -v["logprobs"][torch.arange(32), torch.tensor(targets)].mean()
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(v["logits"], torch.tensor(targets)).item(), rel=1e-12)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-13)
    assert by_hand.keys() == v.keys()
    for name, value in v.items():
        assert value.grad is not None
        np.testing.assert_allclose(by_hand[name], value.grad.numpy(), rtol=1e-9, atol=1e-14, err_msg=name)
    for name, value in t.items():
        assert value.grad is not None
        np.testing.assert_allclose(grads[name], value.grad.numpy(), rtol=1e-9, atol=1e-14, err_msg=name)

    at_once = char_model.cross_entropy_at_once(values["logits"], targets)
    np.testing.assert_allclose(at_once, by_hand["logits"], atol=1e-15)
    at_once = char_model.batch_norm_at_once(by_hand["act"], values["norm"], values["inv"], p["gain"])
    np.testing.assert_allclose(at_once, by_hand["pre"], atol=1e-15)
    assert np.abs(grads["b1"]).max() < 1e-15  # useless before the normalisation
    assert np.abs(by_hand["top"]).max() < 1e-15


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_training_steps_of_llama_stay_in_lockstep_with_the_model_gradients_and_weights(tied):
    config = tiny.replace(tiny.FAMILY_CONFIGS["llama"], tie_embeddings=tied)
    model = tiny.build_model(config=config)
    by = tuple(x.double().numpy() for x in rotation(config.resolved(), torch.arange(tiny.SEQ_LEN)))
    np.testing.assert_allclose(by, llama.rotation(tiny.SEQ_LEN, 4), rtol=0, atol=1e-6)  # the model's are float32
    params = {name: p.numpy().copy() for name, p in state_tensors(model).items()}
    by_hand = adamw.ReferenceAdamW(params)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    rows = tiny.Rows()
    for step in range(20):
        idx, targets = rows.rows(step % 3)
        count = int((targets != gpt2.IGNORE_INDEX).sum())
        optimizer.zero_grad()
        hidden = model.hidden(idx).flatten(0, 1)
        expected = (
            model.ops.linear_cross_entropy(hidden, model.head_weight, targets.flatten(), config.vocab_size) / count
        )
        expected.backward()
        loss, _, grads = llama.loss_and_gradients(
            params, idx.numpy(), targets.numpy(), config.n_head, config.n_kv_head, 1 / count, by=by
        )
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, p in model.named_parameters():
            assert p.grad is not None
            grad = unpadded(model, name, p.grad).numpy()
            assert np.linalg.norm(grads[name] - grad) < 1e-9 * np.linalg.norm(grad), (step, name)
        grads, _ = adamw.clip_gradients(grads, 1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        params = by_hand.step(params, grads, 3e-3)
        for name, p in state_tensors(model).items():
            assert np.linalg.norm(params[name] - p.numpy()) < 1e-9 * np.linalg.norm(p.numpy()), (step, name)
