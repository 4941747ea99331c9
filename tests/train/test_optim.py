"""The optimizer's groups, its steps against AdamW by hand, and its state on the way to a disk and back."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from regpt.config import RunConfig, read_config
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.reference import adamw
from regpt.train.config import OptimConfig, OptimGroup
from regpt.train.optim import load_optimizer, make_optimizer, optimizer_tensors, set_lr


@pytest.mark.parametrize(
    ("pad_vocab", "decayed"),
    # The lecture prints 124,354,560 with its vocabulary of 50304; 47 rows of 768 less without padding.
    # What it prints, 50 tensors, is the 48 matrices of the blocks and the two embeddings.
    [(True, 124_318_464 + (50304 - 50257) * 768), (False, 124_318_464)],
    ids=["padded", "real vocabulary"],
)
def test_matrices_and_embeddings_decay_and_nothing_else(pad_vocab: bool, decayed: int):
    with torch.device("meta"):
        model = make_model(ModelConfig(), pad_vocab=pad_vocab)
    one, two = make_optimizer(model, OptimConfig(weight_decay=0.1), torch.device("meta")).param_groups
    assert (two["weight_decay"], one["weight_decay"]) == (0.1, 0.0)
    assert (len(two["params"]), len(one["params"])) == (50, 98)
    assert sum(p.numel() for p in two["params"]) == decayed
    assert sum(p.numel() for p in one["params"]) == 121_344
    assert 124_318_464 + 121_344 == 124_439_808


def test_parameters_that_do_not_learn_are_left_out():
    model = tiny.build_model()
    model.wpe.weight.requires_grad_(False)
    groups = make_optimizer(model, OptimConfig(), tiny.CPU).param_groups
    assert all(p is not model.wpe.weight for group in groups for p in group["params"])


def test_the_defaults_are_gpt3s():
    optimizer = make_optimizer(tiny.build_model(), OptimConfig(), tiny.CPU)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["lr"] == 6e-4


def test_updates_are_adamw_by_hand():
    model = tiny.build_model(pad_vocab=False)
    config = OptimConfig(lr=3e-3, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = make_optimizer(model, config, tiny.CPU)
    params = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    by_hand = adamw.ReferenceAdamW(params, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    rng = np.random.default_rng(0)
    for step in range(4):
        lr = 3e-3 / (step + 1)
        grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(grads[name])
        set_lr(optimizer, 1 / (step + 1))
        optimizer.step()
        params = by_hand.step(params, grads, lr)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), params[name], rtol=1e-10, atol=1e-13, err_msg=name)
    moments = optimizer_tensors(model, optimizer)
    for name in params:
        np.testing.assert_allclose(moments[f"exp_avg/{name}"].numpy(), by_hand.exp_avg[name], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(moments[f"exp_avg_sq/{name}"].numpy(), by_hand.exp_avg_sq[name], rtol=1e-10)


def after(steps: int, *, pad_vocab: bool = True):
    trainer = tiny.build_trainer(tiny.build_model(pad_vocab=pad_vocab), tiny.Rows())
    for _ in range(steps):
        tiny.update(trainer)
    return trainer


def test_before_the_first_update_the_moments_are_there_and_zero():
    trainer = after(0)
    load_optimizer(trainer.model, trainer.optimizer, {}, step=0)
    moments = optimizer_tensors(trainer.model, trainer.optimizer)
    assert len(moments) == 2 * len(trainer.backend.parameters)
    assert not any(tensor.any() for tensor in moments.values())


def test_moments_made_beforehand_are_those_that_torch_makes_in_its_first_step():
    model, gradient = tiny.build_model(), torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=gradient, dtype=p.dtype) for p in model.parameters()]
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    found = []
    for forget in (False, True):
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2), tiny.CPU)
        if forget:
            optimizer.state.clear()
        for p, gradient_of_p, w in zip(model.parameters(), grads, start.values()):
            p.data.copy_(w)
            p.grad = gradient_of_p.clone()
        optimizer.step()
        found.append([{key: optimizer.state[p][key].clone() for key in optimizer.state[p]} for p in model.parameters()])
    for ours, theirs in zip(*found):
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pad_vocab", [True, False])
def test_state_that_was_saved_and_read_goes_on_bitwise(pad_vocab: bool, fused: bool):
    straight = after(3)
    kept = optimizer_tensors(straight.model, straight.optimizer)
    assert kept["exp_avg/wte.weight"].shape == (97, 24)  # no padding rows
    resumed = after(0, pad_vocab=pad_vocab)
    with torch.no_grad():
        for mine, other in zip(resumed.model.parameters(), straight.model.parameters()):
            mine.copy_(other[: len(mine)])
    if not fused:
        for trainer in (straight, resumed):
            trainer.optimizer.defaults["fused"] = None
            for group in trainer.optimizer.param_groups:
                group["fused"] = None
    load_optimizer(resumed.model, resumed.optimizer, {name: t.clone() for name, t in kept.items()}, step=3)
    resumed.step = 3
    for _ in range(3):
        rows = tiny.update(straight), tiny.update(resumed)
        assert rows[0]["step"] == rows[1]["step"]
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0 if pad_vocab else 1e-13)
    theirs, ours = (optimizer_tensors(t.model, t.optimizer) for t in (straight, resumed))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0 if pad_vocab else 1e-9, atol=0 if pad_vocab else 1e-14)


def test_state_that_does_not_fit_is_refused_by_name():
    trainer = after(1)
    tensors = optimizer_tensors(trainer.model, trainer.optimizer)
    sentence = r"lacks 'exp_avg_sq/h\.1\.mlp\.c_fc\.weight' of shape \(96, 24\); resume from another checkpoint"
    for wrong in ({}, {"exp_avg_sq/h.1.mlp.c_fc.weight": torch.zeros(24, 96)}):
        given = {n: t for n, t in tensors.items() if n != "exp_avg_sq/h.1.mlp.c_fc.weight"} | wrong
        with pytest.raises(UserError, match=sentence):
            load_optimizer(trainer.model, trainer.optimizer, given, step=1)


# ---- groups ----------------------------------------------------------------------------------------------------------


def settings(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, tuple]:
    """For each parameter: its rate before the schedule, its decay and its betas."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (group["initial_lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_the_first_group_whose_pattern_matches_counts():
    model = tiny.build_model()
    groups = (
        OptimGroup("wpe.*", lr_scale=0.5),
        OptimGroup("w?e.*", weight_decay=0.7, beta2=0.99),
        OptimGroup("h.0.*", lr_scale=2.0),
    )
    config = OptimConfig(lr=0.1, weight_decay=0.2, groups=groups)
    found = settings(make_optimizer(model, config, tiny.CPU), model)
    assert len(found) == len(list(model.parameters()))
    assert found["wpe.weight"] == (0.05, 0.2, (0.9, 0.95))
    assert found["wte.weight"] == (0.1, 0.7, (0.9, 0.99))
    assert found["h.0.mlp.c_fc.bias"] == (0.2, 0.2, (0.9, 0.95))
    assert found["h.1.mlp.c_fc.bias"] == (0.1, 0.0, (0.9, 0.95))
    assert found["h.1.mlp.c_fc.weight"] == (0.1, 0.2, (0.9, 0.95))


def test_the_schedule_is_a_factor_on_the_rate_of_each_group():
    optimizer = make_optimizer(tiny.build_model(), OptimConfig(lr=0.1, groups=(OptimGroup("wpe.*", 0.5),)), tiny.CPU)
    for factor in (0.5, 0.1):
        set_lr(optimizer, factor)
        assert {round(group["lr"] / factor, 12) for group in optimizer.param_groups} == {0.1, 0.05}


def test_a_group_that_scales_by_zero_does_not_learn():
    model = tiny.build_model()
    optim = replace(tiny.OPTIM, groups=(OptimGroup("wpe.*", lr_scale=0.0),))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.update(tiny.build_trainer(model, tiny.Rows(), optim=optim))
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed == set(before) - {"wpe.weight"}


def test_a_pattern_that_matches_nothing_first_is_refused():
    for groups in ((OptimGroup("wpx.*"),), (OptimGroup("wpe.*"), OptimGroup("wpe.weight"))):
        with pytest.raises(UsageError, match=rf"pattern '{re.escape(groups[-1].pattern)}', which is the first"):
            make_optimizer(tiny.build_model(), OptimConfig(groups=groups), tiny.CPU)


def test_groups_come_back_from_a_file_as_they_were(tmp_path):
    config = replace(RunConfig(), optim=OptimConfig(groups=(OptimGroup("*.bias", lr_scale=2.0, beta1=0.8),)))
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert read_config(str(tmp_path / "config.toml")).optim == config.optim
    (tmp_path / "config.toml").write_text('[[optim.groups]]\npattern = "*"\nlr_scale = -1.0\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"optim.groups.lr_scale is -1.0, must be 0 or more"):
        read_config(str(tmp_path / "config.toml"))


def test_the_state_of_any_optimizer_is_stored_by_its_own_names():
    model = tiny.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert set(kept) == {f"momentum_buffer/{name}" for name, _ in model.named_parameters()}
    assert kept["momentum_buffer/wte.weight"].shape == (97, 24)
    load_optimizer(model, optimizer, {}, step=0)
    assert not any(tensor.any() for tensor in optimizer_tensors(model, optimizer).values())
    load_optimizer(model, optimizer, kept, step=1)
    assert all(tensor.equal(kept[name]) for name, tensor in optimizer_tensors(model, optimizer).items())
