"""The moving average of the weights: what the formula says, without an effect on training."""

import pytest
import torch

import tiny
from regpt.errors import UsageError, UserError
from regpt.model.weights import state_tensors
from regpt.train.average import Average
from regpt.train.config import TrainConfig

DECAY = 0.8


def trained(updates: int, *, average: bool = True):
    """A trainer after some updates, its average, and the weights after each update."""
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows())
    kept = Average(trainer.model, trainer.optimizer, DECAY) if average else None
    weights = [copies(trainer.model)]
    for _ in range(updates):
        tiny.update(trainer)
        weights.append(copies(trainer.model))
    return trainer, kept, weights


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state_tensors(model).items()}


def test_it_is_what_the_formula_says():
    _, average, weights = trained(9)
    for name, found in average.tensors().items():
        expected = weights[0][name]
        for t in range(1, 10):
            decay = min(DECAY, (1 + t) / (10 + t))
            expected = decay * expected + (1 - decay) * weights[t][name]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert average.updates == 9


def test_training_is_bitwise_the_same_without_it():
    with_it, without = trained(4)[2], trained(4, average=False)[2]
    assert all(a.equal(b) for x, y in zip(with_it, without) for a, b in zip(x.values(), y.values()))


def test_applied_it_is_what_the_model_computes_with_and_the_weights_come_back_bitwise():
    trainer, average, _ = trained(3)
    before, averages = copies(trainer.model), {name: a.clone() for name, a in average.tensors().items()}
    version = trainer.model.wte.weight._version
    with average.applied():
        assert all(tensor.equal(averages[name]) for name, tensor in state_tensors(trainer.model).items())
        assert trainer.model.wte.weight._version > version  # copies of the weights are renewed
    with pytest.raises(ZeroDivisionError), average.applied():
        _ = 1 / 0
    assert all(tensor.equal(before[name]) for name, tensor in state_tensors(trainer.model).items())
    assert all(tensor.equal(averages[name]) for name, tensor in average.tensors().items())


def test_it_goes_on_where_it_was():
    trainer, average, _ = trained(3)
    stored = {name: tensor.clone() for name, tensor in average.tensors().items()}
    again = Average(trainer.model, torch.optim.SGD(trainer.model.parameters()), DECAY)
    again.load(stored, 3)
    assert again.tensors().keys() == stored.keys()
    assert all(tensor.equal(stored[name]) for name, tensor in again.tensors().items())
    average.follow()
    again.follow()
    assert all(tensor.equal(average.tensors()[name]) for name, tensor in again.tensors().items())
    del stored["ln_f.bias"]
    with pytest.raises(UserError, match=r"the average lacks 'ln_f\.bias' of shape \(24,\)"):
        again.load(stored, 3)


def test_only_what_learns_is_averaged_at_its_real_size():
    model = tiny.build_model()
    model.wpe.weight.requires_grad_(False)
    average = Average(model, torch.optim.SGD(p for p in model.parameters() if p.requires_grad), DECAY)
    assert average.tensors().keys() == state_tensors(model).keys() - {"wpe.weight"}
    assert average.tensors()["wte.weight"].size(0) == 97


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_bounds_is_refused(decay):
    with pytest.raises(UsageError, match=r"train\.ema_decay is"):
        TrainConfig(ema_decay=decay)


def test_of_bfloat16_weights_it_is_float32_and_the_weights_come_back_bitwise():
    """A share of 0.2 of a change in the last digit is kept; the model computes with the average rounded."""
    model = tiny.build_model(dtype=torch.bfloat16)
    average = Average(model, torch.optim.SGD(model.parameters()), DECAY)
    average.updates = 1000  # the decay is its own
    first = copies(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2**-7)
    average.follow()
    weights = copies(model)
    for name, found in average.tensors().items():
        expected = DECAY * first[name].double() + (1 - DECAY) * weights[name].double()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)
    averages = {name: a.clone() for name, a in average.tensors().items()}
    for _ in range(2):
        with average.applied():
            applied = state_tensors(model)
            assert all(tensor.equal(averages[name].to(torch.bfloat16)) for name, tensor in applied.items())
        assert all(tensor.equal(weights[name]) for name, tensor in state_tensors(model).items())
        assert all(tensor.equal(averages[name]) for name, tensor in average.tensors().items())
