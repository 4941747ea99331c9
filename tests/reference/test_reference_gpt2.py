"""The whole NumPy model: against finite differences, against the torch Transformer, and with input that is wrong."""

import numpy as np
import pytest
import torch

from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import initialize, load_weights, state_tensors, unpadded
from regpt.reference import adamw, gpt2

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=24, vocab_size=61, max_seq_len=10)
MAX_NORM = 1.5  # between the smallest and the largest gradient norm of the training below


def random_params(rng, config=CONFIG):
    """Larger than at initialisation, so that every part has an effect; LayerNorm and biases random too."""
    shapes = gpt2.parameter_shapes(config.n_layer, config.n_embd, config.vocab_size, config.max_seq_len)
    return {name: rng.normal(0.0, 0.3, shape) for name, shape in shapes.items()}


def random_batch(rng, B=3, T=8, masked=0.3):
    idx, targets = rng.integers(CONFIG.vocab_size, size=(2, B, T))
    return idx, np.where(rng.random((B, T)) < masked, gpt2.IGNORE_INDEX, targets)


def torch_model(params, pad_vocab):
    model = make_model(CONFIG, pad_vocab=pad_vocab).double()
    return load_weights(model, {name: torch.from_numpy(p) for name, p in params.items()})


def torch_loss(model, idx, targets):
    """Sum over the valid targets, as the trainer computes it."""
    hidden = model.hidden(torch.from_numpy(idx)).flatten(0, 1)
    flat = torch.from_numpy(targets).flatten()
    return model.ops.linear_cross_entropy(hidden, model.head_weight, flat, CONFIG.vocab_size)


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_gradients_of_the_model_agree_with_finite_differences():
    rng = np.random.default_rng(0)
    params, (idx, targets) = random_params(rng), random_batch(rng)
    _, _, grads = gpt2.loss_and_gradients(params, idx, targets, CONFIG.n_head, scale=0.1)
    for name, p in params.items():
        direction = rng.normal(size=p.shape)
        up, down = (
            gpt2.loss_and_gradients(params | {name: p + h * direction}, idx, targets, CONFIG.n_head, scale=0.1)[0]
            for h in (1e-5, -1e-5)
        )
        assert (grads[name] * direction).sum() == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["every target", "some targets masked"])
@pytest.mark.parametrize("pad_vocab", [True, False], ids=["padded vocabulary", "real vocabulary"])
def test_logits_loss_and_gradients_are_those_of_the_torch_model(pad_vocab, masked):
    rng = np.random.default_rng(1)
    params, (idx, targets) = random_params(rng), random_batch(rng, masked=masked)
    model = torch_model(params, pad_vocab)
    count = int((targets != gpt2.IGNORE_INDEX).sum())
    expected = torch_loss(model, idx, targets) / count
    expected.backward()

    loss, n, grads = gpt2.loss_and_gradients(params, idx, targets, CONFIG.n_head, scale=1 / count)
    assert n == count
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    logits = model(torch.from_numpy(idx)).detach().numpy()
    assert relative_error(gpt2.logits(params, idx, CONFIG.n_head), logits) < 1e-12
    named = dict(model.named_parameters())
    assert grads.keys() == named.keys()
    for name, p in named.items():
        assert p.grad is not None
        assert relative_error(grads[name], unpadded(model, name, p.grad).numpy()) < 1e-10, name
    if pad_vocab:
        assert model.wte.weight.grad is not None
        padding = model.wte.weight.grad[CONFIG.vocab_size :]
        assert len(padding) == 128 - CONFIG.vocab_size
        assert (padding == 0).all()


def test_parameters_are_those_of_the_torch_model():
    shapes = gpt2.parameter_shapes(CONFIG.n_layer, CONFIG.n_embd, CONFIG.vocab_size, CONFIG.max_seq_len)
    assert shapes == {name: tuple(p.shape) for name, p in state_tensors(make_model(CONFIG)).items()}


def test_the_key_bias_has_no_gradient():
    """It adds the same number to every score of a query, and softmax ignores that."""
    rng = np.random.default_rng(2)
    params, (idx, targets) = random_params(rng), random_batch(rng)
    grads = gpt2.loss_and_gradients(params, idx, targets, CONFIG.n_head)[2]
    q, k, v = np.split(grads["h.0.attn.c_attn.bias"], 3)
    assert np.abs(k).max() < 1e-13 * min(np.abs(q).max(), np.abs(v).max())


def test_micro_batches_add_up_to_the_batch_whatever_their_masks():
    rng = np.random.default_rng(3)
    params, (idx, targets) = random_params(rng), random_batch(rng, B=4)
    targets[0] = gpt2.IGNORE_INDEX  # one micro-batch without any target
    count = int((targets != gpt2.IGNORE_INDEX).sum())
    loss, _, grads = gpt2.loss_and_gradients(params, idx, targets, CONFIG.n_head, scale=1 / count)
    rows = [slice(0, 1), slice(1, 2), slice(2, 4)]
    parts = [gpt2.loss_and_gradients(params, idx[r], targets[r], CONFIG.n_head, scale=1 / count) for r in rows]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-13)
    assert parts[0][1] == 0
    for name, grad in grads.items():
        assert relative_error(sum(part[2][name] for part in parts), grad) < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_dtype_of_the_parameters(dtype):
    rng = np.random.default_rng(4)
    params = {name: p.astype(dtype) for name, p in random_params(rng).items()}
    idx, targets = random_batch(rng)
    grads = gpt2.loss_and_gradients(params, idx, targets, CONFIG.n_head, scale=0.5)[2]
    assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}
    assert gpt2.logits(params, idx, CONFIG.n_head).dtype == dtype
    clipped, _ = adamw.clip_gradients(grads, 1.0)
    updated = adamw.ReferenceAdamW(params).step(params, clipped, 1e-3)
    assert {p.dtype for p in updated.values()} == {np.dtype(dtype)}


def torch_step(model, optimizer, micro_batches, lr, max_norm):
    """Loss and gradient norm of one update, made in place."""
    count = sum(int((targets != gpt2.IGNORE_INDEX).sum()) for _, targets in micro_batches)
    optimizer.zero_grad()
    loss = 0.0
    for idx, targets in micro_batches:
        part = torch_loss(model, idx, targets) / count
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss, norm


def numpy_step(params, optimizer, micro_batches, lr, max_norm):
    """Loss, gradient norm and parameters of one update."""
    count = sum(int((targets != gpt2.IGNORE_INDEX).sum()) for _, targets in micro_batches)
    parts = [gpt2.loss_and_gradients(params, idx, y, CONFIG.n_head, scale=1 / count) for idx, y in micro_batches]
    grads = {name: np.sum([part[2][name] for part in parts], axis=0) for name in params}
    grads, norm = adamw.clip_gradients(grads, max_norm)
    return sum(part[0] for part in parts), norm, optimizer.step(params, grads, lr)


def test_twenty_training_steps_stay_in_lockstep_with_torch():
    """Two micro-batches with unequal masks, global count, clipping, schedule and AdamW, in float64."""
    rng = np.random.default_rng(5)
    model = initialize(make_model(CONFIG), seed=5).double()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    params = {name: p.numpy().copy() for name, p in state_tensors(model).items()}
    ours = adamw.ReferenceAdamW(params)
    norms = []
    for step in range(1, 21):
        micro_batches = [random_batch(rng, masked=0.1), random_batch(rng, masked=0.6)]
        lr = adamw.lr_at(step, lr=3e-3, min_lr=3e-4, warmup_steps=5, decay_steps=18)
        expected_loss, expected_norm = torch_step(model, theirs, micro_batches, lr, MAX_NORM)
        loss, norm, params = numpy_step(params, ours, micro_batches, lr, MAX_NORM)
        norms.append(norm)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert norm == pytest.approx(expected_norm, rel=1e-9)
        for name, p in state_tensors(model).items():
            assert relative_error(params[name], p.numpy()) < 1e-9, (step, name)
    assert min(norms) < MAX_NORM < max(norms)  # some updates were clipped, some were not


WRONG = [
    ("idx", np.array([[0, 61]]), "holds 61, must lie in 0 … 60"),
    ("idx", np.array([[0, -1]]), "holds -1"),
    ("idx", np.zeros((1, 11), dtype=int), "11 tokens a row, the model has 10 positions"),
    ("idx", np.zeros(4, dtype=int), r"must be integers \(B, T\)"),
    ("idx", np.zeros((1, 4)), r"must be integers \(B, T\)"),
    ("targets", np.array([[1, 2, 61, 3]]), "targets holds 61"),
    ("targets", np.array([[1, 2, -1, 3]]), "targets holds -1"),
    ("targets", np.zeros((1, 3), dtype=int), "one target for each token"),
    ("n_head", 5, "n_head is 5, must divide the model's width 24"),
    ("n_head", 0, "n_head is 0"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG, ids=[f"{w[0]} {i}" for i, w in enumerate(WRONG)])
def test_wrong_input_is_refused_in_one_sentence(argument, value, message):
    params = random_params(np.random.default_rng(6))
    arguments = {"idx": np.zeros((1, 4), dtype=int), "targets": np.zeros((1, 4), dtype=int), "n_head": 3}
    with pytest.raises(UserError, match=message):
        gpt2.loss_and_gradients(params, **(arguments | {argument: value}))


def without(name):
    return lambda params: {key: p for key, p in params.items() if key != name}


WRONG_PARAMS = [
    (without("wte.weight"), "'wte.weight' is missing"),
    (without("h.1.mlp.c_fc.bias"), "'h.1.mlp.c_fc.bias' is missing"),
    (without("h.0.ln_1.weight"), "'h.0.ln_1.weight' is missing"),
    (lambda p: p | {"lm_head.weight": p["wte.weight"]}, "'lm_head.weight' is unknown"),
    (lambda p: p | {"ln_f.bias": np.zeros(1)}, r"shape \(1,\), this model needs \(24,\)"),
    (lambda p: p | {"ln_f.bias": torch.zeros(24)}, "is a Tensor, must be a NumPy array"),
    (lambda p: p | {"wte.weight": torch.zeros(61, 24)}, "is a Tensor, must be a NumPy array"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PARAMS, ids=[message for _, message in WRONG_PARAMS])
def test_parameters_that_make_no_gpt2_are_refused(change, message):
    params = change(random_params(np.random.default_rng(7)))
    with pytest.raises(UserError, match=message):
        gpt2.logits(params, np.zeros((1, 4), dtype=int), 3)


def test_no_valid_target_gives_no_loss_and_no_gradient():
    params = random_params(np.random.default_rng(8))
    targets = np.full((1, 4), gpt2.IGNORE_INDEX)
    loss, count, grads = gpt2.loss_and_gradients(params, np.zeros((1, 4), dtype=int), targets, 3)
    assert (loss, count) == (0.0, 0)
    assert all((g == 0).all() for g in grads.values())
