"""Each protection of a step on each path of the loss: fresh weights, lack of memory, the loss scale, the watchdog."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tiny
from kernels.paths import PATHS, loss_path
from regpt.data.batch import Batch
from regpt.model.families import make_model
from regpt.model.weights import initialize, load_weights, state_tensors
from regpt.train.average import Average
from regpt.train.trainer import Trainer

CLOSE = 1e-9  # FP8's bounds and scales are float32


@pytest.fixture(params=PATHS)
def path(request) -> str:
    return request.param


def trainer_of(
    path: str, wrap: Callable = lambda loss_sum: loss_sum, precision: str = "fp64", rows: int = 4
) -> Trainer:
    torch.compiler.reset()
    model, train = tiny.build_model(), tiny.replace(tiny.TRAIN, precision=precision, grad_clip=0.0)
    return tiny.build_trainer(
        model, tiny.Rows(micro_batch_rows=rows), loss_sum=wrap(loss_path(path, model)), train=train
    )


def test_the_loss_follows_whoever_writes_the_weights(path: str):
    """The optimizer, a checkpoint or another model that is loaded, an average that is put in, a fault."""
    trainer = trainer_of(path)
    model, average = trainer.model, Average(trainer.model, trainer.optimizer, 0.5)
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}

    def fresh() -> Tensor:
        trainer.gradients()
        loss = tiny.loss_sum_of(trainer)(Batch(*tiny.Rows().rows(0)))
        other = make_model(model.config, pad_vocab=True).double()
        expected = loss_path("plain", load_weights(other, state_tensors(model)))(Batch(*tiny.Rows().rows(0)))
        torch.testing.assert_close(loss, expected, rtol=CLOSE, atol=0, equal_nan=True)
        return loss.detach()

    losses = [fresh()]
    tiny.update(trainer)
    losses.append(fresh())
    with average.applied():
        losses.append(fresh())
    assert fresh() == losses[1]
    load_weights(model, before)
    assert fresh() == losses[0]
    initialize(model, 7)
    losses.append(fresh())
    for parameter, value in (
        (model.ln_f.weight, 2.0),
        (model.h[1].ln_2.bias, 0.5),
        (model.h[0].mlp.c_fc.weight, math.nan),
    ):
        with torch.no_grad():
            parameter[3] = value
        losses.append(fresh())
    assert losses[-1].isnan()
    load_weights(model, before)
    assert fresh() == losses[0]
    assert len({loss.item() for loss in losses}) == len(losses)


def test_a_step_that_runs_out_of_memory_is_made_in_smaller_parts(path: str):
    """Also in its second micro-batch, after gradients of the first were added."""

    def limited(loss_sum):
        large = []

        def call(batch: Batch) -> Tensor:
            if len(batch.idx) > 2:
                large.append(batch)
                if len(large) == 1:
                    return loss_sum(batch)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss_sum(batch)

        return call

    found, expected = tiny.step_gradients(trainer_of(path, limited)), tiny.step_gradients(trainer_of(path, rows=2))
    assert tiny.largest_error(found, expected) == 0


def test_a_scale_that_lets_gradients_overflow_is_made_smaller_and_changes_no_gradient(path: str):
    trainer = trainer_of(path, lambda loss_sum: lambda batch: Overflowing.apply(loss_sum(batch)), precision="fp16")
    expected = trainer_of(path)
    row = tiny.update(trainer)
    assert trainer.loss_scale.scale < 2**16
    other = tiny.update(expected)
    assert (row["loss"], row["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=CLOSE)


class Overflowing(torch.autograd.Function):
    """A loss whose gradients overflow where its own is above 1."""

    @staticmethod
    def forward(ctx, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx, scale: Tensor) -> Tensor:  # type: ignore[override]
        return scale * math.inf if scale > 1 else scale


def test_the_watchdog_sees_the_same_waits(path: str):
    trainer, plain = trainer_of(path), trainer_of("plain")
    for one in (trainer, plain):
        object.__setattr__(one, "mesh", tiny.replace(one.mesh, pulse=type(one.mesh.pulse)()))
        tiny.update(one)
    assert trainer.mesh.pulse.note() | {"time": 0} == plain.mesh.pulse.note() | {"time": 0}
    assert trainer.mesh.pulse.waits > 0
