"""float16: its scaler follows torch's rule, loses no update, and all processes decide alike."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.data.batch import Batch
from regpt.errors import UserError
from regpt.model.weights import state_tensors
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.pretrain import pretrain, resume
from regpt.train import loss_scale
from regpt.train.config import TrainConfig
from regpt.train.loss_scale import LossScale
from regpt.train.trainer import Row, Trainer

FP16 = TrainConfig(precision="fp16")


def half_trainer(mesh: Mesh = tiny.ALONE) -> Trainer:
    loader = tiny.Rows(micro_batch_rows=2, dp_rank=mesh.rank, dp_size=mesh.world_size)
    return tiny.build_trainer(tiny.build_model(dtype=torch.float32), loader, mesh=mesh, train=FP16)


# ---- the rule --------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=30))
def test_the_scale_is_that_of_torchs_scaler(overflows: list[bool]):
    theirs = torch.amp.GradScaler("cpu", init_scale=loss_scale.FIRST_SCALE, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours = LossScale(dynamic=True)
    interval, loss_scale.GROWTH_INTERVAL = loss_scale.GROWTH_INTERVAL, 3
    try:
        for overflow in overflows:
            weight.grad = None
            theirs.scale(weight.sum() * (math.inf if overflow else 1.0)).backward()
            theirs.step(optimizer)
            theirs.update()
            again = ours.backs_off(1.0, math.inf if overflow else 1.0)
            assert again == overflow
            if not again:
                ours.note_update()
            assert ours.scale == theirs.get_scale()
    finally:
        loss_scale.GROWTH_INTERVAL = interval


def test_the_constants_are_torchs():
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == loss_scale.FIRST_SCALE
    assert theirs.get_growth_factor() == loss_scale.GROWTH
    assert theirs.get_backoff_factor() == loss_scale.BACKOFF
    assert theirs.get_growth_interval() == loss_scale.GROWTH_INTERVAL


@pytest.mark.parametrize(
    ("scale", "dynamic", "loss", "norm", "again"),
    [
        (8.0, True, 1.0, math.nan, True),
        (8.0, True, 1.0, 3.0, False),
        (8.0, True, math.nan, math.nan, False),  # the scale multiplies the loss afterwards
        (1.0, True, 1.0, math.inf, False),
        (8.0, False, 1.0, math.inf, False),
    ],
)
def test_a_step_is_repeated_only_where_a_smaller_scale_can_help(scale, dynamic, loss, norm, again):
    ours = LossScale(dynamic=dynamic)
    ours.scale = scale
    assert ours.backs_off(loss, norm) is again
    assert ours.scale == (scale / 2 if again else scale)


def test_in_other_precisions_nothing_is_scaled_or_kept():
    ours = LossScale(dynamic=False)
    ours.load_state({"scale": 8.0, "good_updates": 3})
    for _ in range(loss_scale.GROWTH_INTERVAL):
        ours.note_update()
    assert (ours.scale, ours.state()) == (1.0, {})


# ---- training --------------------------------------------------------------------------------------------------------


def test_float16_rounds_products_and_nothing_that_is_kept():
    trainer = half_trainer()
    found = tiny.step_gradients(trainer)
    exact = tiny.step_gradients(tiny.build_trainer(tiny.build_model(), tiny.Rows(micro_batch_rows=2)))
    assert {tensor.dtype for name, tensor in found.items() if name not in ("loss", "norm")} == {torch.float32}
    error = tiny.largest_error({name: tensor.double() for name, tensor in found.items()}, exact)
    assert 1e-5 < error < 1e-2  # eleven bits; bfloat16's eight give up to 0.1 here
    tiny.update(trainer)
    assert {w.dtype for w in state_tensors(trainer.model).values()} == {torch.float32}


def test_without_a_scale_small_gradients_vanish():
    """The batch is large, so that each token's gradient is small: the reason for the scale."""
    trainer = half_trainer()

    def gradients(scale: float) -> float:
        trainer.loss_scale.scale = scale
        own = tiny.loss_sum_of(trainer)
        tiny.compute_by(trainer, lambda batch: own(batch) * 2.0**-24)
        try:
            return tiny.step_gradients(trainer)["h.0.mlp.c_fc.weight"].norm().item()
        finally:
            tiny.compute_by(trainer, own)

    assert gradients(1.0) == 0
    assert gradients(2.0**20) > 0


def test_a_step_that_overflows_is_repeated_and_no_update_is_lost():
    trainer, events = half_trainer(), []
    trainer.do = SimpleNamespace(log=events.append)
    trainer.loss_scale.scale = 2.0**40
    row = tiny.update(trainer)
    fits = trainer.loss_scale.scale
    assert fits < 2.0**40
    assert [(e["name"], e["step"], e["reason"]) for e in events] == [("loss_scale", 0, "overflow")] * len(events)
    assert [e["loss_scale"] for e in events] == [2.0**k for k in range(39, int(math.log2(fits)) - 1, -1)]
    calm = half_trainer()
    calm.loss_scale.scale = fits
    expected = tiny.update(calm)
    assert all(row[key] == expected[key] for key in ("step", "loss", "grad_norm", "lr"))
    assert all(w.equal(state_tensors(calm.model)[name]) for name, w in state_tensors(trainer.model).items())
    assert trainer.step == 1
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {1}


def test_the_scale_changes_no_result_but_by_rounding():
    rows = []
    for scale in (2.0**10, 2.0**14):
        trainer = half_trainer()
        trainer.loss_scale.scale = scale
        rows.append([tiny.update(trainer) for _ in range(3)])
    for mine, other in zip(*rows):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_gradients_that_overflow_without_a_scale_stop_the_run():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * math.inf

    trainer = half_trainer()
    good = tiny.loss_sum_of(trainer)
    tiny.compute_by(trainer, lambda batch: Steep.apply(good(batch)))  # type: ignore[return-value]
    with pytest.raises(UserError, match=r"the gradient norm (nan|inf)"):
        tiny.update(trainer)
    assert trainer.loss_scale.scale == loss_scale.LEAST_SCALE


# ---- processes -------------------------------------------------------------------------------------------------------


def together(overflowing: bool) -> dict[str, Any]:
    """Two processes; in the second update the last one's gradients overflow, once."""
    with open_mesh("cpu") as mesh:
        trainer = half_trainer(mesh)
        good, left = tiny.loss_sum_of(trainer), [1 if overflowing and mesh.rank == mesh.world_size - 1 else 0]

        def loss_sum(batch: Batch) -> Tensor:
            loss = good(batch)
            if trainer.step == 1 and left[0]:
                left[0] -= 1
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss

        tiny.compute_by(trainer, loss_sum)
        if not overflowing:
            trainer.loss_scale.scale /= 2  # what the others come to
        for _ in range(3):
            tiny.update(trainer)
        weights = {name: w.clone() for name, w in state_tensors(trainer.model).items()}
        return {"scale": trainer.loss_scale.scale, "weights": weights}


def test_an_overflow_in_one_process_is_one_in_all():
    found = tiny.in_processes(2, together, True)
    expected = tiny.in_processes(2, together, False)
    assert [mine["scale"] for mine in found] == [loss_scale.FIRST_SCALE / 2] * 2
    for mine in found:
        for name, w in mine["weights"].items():
            assert w.equal(found[0]["weights"][name])
            assert (w - expected[0]["weights"][name]).norm() <= 1e-2 * w.norm()


# ---- a run -----------------------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_scale_is_kept_in_checkpoints_and_a_resumed_run_is_bitwise_the_same(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**30)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    config = tiny.change(tiny.run_config(shards), "train", precision="fp16")
    run, cut = tmp_path / "run", tmp_path / "cut"
    assert pretrain(config, run) == 0
    changes = [row for row in rows_of(run) if row.get("name") == "loss_scale"]
    assert {row["reason"] for row in changes} == {"overflow", "growth"}
    shutil.copytree(run, cut)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(cut, later))
    kept = json.loads((checkpoint_folder(run, 4) / "state.json").read_text(encoding="utf-8"))["trainer"]["loss_scale"]
    assert kept["scale"] == next(row["loss_scale"] for row in reversed(changes) if int(str(row["step"])) <= 4)
    assert resume(cut) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoint_folder(cut, 8) / name).read_bytes() == (checkpoint_folder(run, 8) / name).read_bytes()
    assert all(math.isfinite(float(str(row["grad_norm"]))) for row in rows_of(run) if row["kind"] == "train")


@pytest.mark.gpu
def test_float16_learns_on_a_gpu(shards, tmp_path):
    losses = []
    for precision in ("fp16", "fp32"):
        config = tiny.change(tiny.run_config(shards), "train", precision=precision, device="cuda")
        assert pretrain(config, tmp_path / precision) == 0
        losses.append([row["loss"] for row in rows_of(tmp_path / precision) if row["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
