"""Moments in host memory: the same updates, and checkpoints that go both ways."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.model.weights import state_tensors
from regpt.parallel.reduce import buckets
from regpt.runs.pretrain import pretrain, resume
from regpt.train import adamw
from regpt.train.adamw import OffloadedAdamW, parts
from regpt.train.config import TrainConfig
from regpt.train.optim import load_optimizer, optimizer_tensors
from regpt.train.trainer import Trainer

OFFLOAD = tiny.replace(tiny.OPTIM, offload=True, weight_decay=0.3, warmup_steps=2)
RESIDENT = tiny.replace(OFFLOAD, offload=False)


def trainer_with(optim, dtype: torch.dtype = torch.float64) -> Trainer:
    train = TrainConfig(precision="fp64" if dtype == torch.float64 else "fp32")
    return tiny.build_trainer(tiny.build_model(dtype=dtype), tiny.Rows(), optim=optim, train=train)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return state_tensors(trainer.model) | optimizer_tensors(trainer.model, trainer.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_bitwise_those_of_the_ordinary_optimizer(dtype: torch.dtype):
    ours, theirs = trainer_with(OFFLOAD, dtype), trainer_with(RESIDENT, dtype)
    assert isinstance(ours.optimizer, OffloadedAdamW)
    for _ in range(5):
        rows = tiny.update(ours), tiny.update(theirs)
        assert rows[0]["loss"] == rows[1]["loss"]
    found, expected = everything(ours), everything(theirs)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert {float(state["step"]) for state in ours.optimizer.state.values()} == {5.0}


@pytest.mark.parametrize(("piece", "arena"), [(100, 2**28), (7, 500), (2**23, 1)])
def test_pieces_of_any_size_give_the_same(monkeypatch, piece: int, arena: int):
    """To the rounding of the CPU's kernel, which treats the ends of a piece otherwise than its middle."""
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", piece)
    monkeypatch.setattr(adamw, "ARENA_BYTES", 8 * arena)
    ours, theirs = trainer_with(OFFLOAD), trainer_with(RESIDENT)
    for _ in range(4):
        tiny.update(ours)
        tiny.update(theirs)
    assert len(ours.optimizer.pieces) > 2  # type: ignore[attr-defined]
    # A gradient that is only rounding, as that of the key bias, AdamW makes as large as any.
    assert tiny.largest_error(state_tensors(ours.model), state_tensors(theirs.model)) < 1e-9


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 60))
def test_pieces_hold_every_element_once_and_in_order(sizes: list[int], piece: int, arena: int):
    parameters = [torch.zeros(n) for n in sizes]
    for members in buckets(parameters, 4 * arena):
        total = sum(p.numel() for p in members)
        found = []
        for start in range(0, total, piece):
            mine = list(parts(members, start, min(start + piece, total)))
            assert sum(part.stop - part.start for part in mine) == min(start + piece, total) - start
            found += [(id(part.parameter), i) for part in mine for i in range(part.start, part.stop)]
        assert found == [(id(p), i) for p in members for i in range(p.numel())]


def test_moments_are_views_of_few_host_tensors():
    trainer = trainer_with(OFFLOAD)
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert {moment.device.type for moment in moments} == {"cpu"}
    assert len({moment.untyped_storage().data_ptr() for moment in moments}) == 2  # that decay, that do not
    assert len(moments) == len(trainer.backend.parameters)


@pytest.mark.parametrize("first", [OFFLOAD, RESIDENT])
def test_state_that_one_saved_the_other_goes_on_with(first):
    straight = trainer_with(RESIDENT)
    begun, gone_on = trainer_with(first), trainer_with(RESIDENT if first is OFFLOAD else OFFLOAD)
    for _ in range(2):
        tiny.update(begun)
    tensors = {name: tensor.clone() for name, tensor in everything(begun).items()}
    with torch.no_grad():
        for mine, other in zip(gone_on.model.parameters(), begun.model.parameters()):
            mine.copy_(other)
    load_optimizer(gone_on.model, gone_on.optimizer, tensors, step=2)
    gone_on.step = 2
    for _ in range(4):
        tiny.update(straight)
    for _ in range(2):
        tiny.update(gone_on)
    expected = everything(straight)
    assert all(tensor.equal(expected[name]) for name, tensor in everything(gone_on).items())


def test_a_run_may_be_resumed_without_what_it_was_begun_with(shards, tmp_path: Path):
    config = tiny.run_config(shards)
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert pretrain(config, straight) == 0
    assert pretrain(tiny.change(config, "optim", offload=True), run) == 0
    for step in (6, 8):
        shutil.rmtree(checkpoint_folder(run, step))
    text = (run / "config.toml").read_text(encoding="utf-8")
    assert "offload = true" in text
    (run / "config.toml").write_text(text.replace("offload = true", "offload = false"), encoding="utf-8")
    assert resume(run) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint_folder(folder, 8) / name).read_bytes() for folder in (run, straight))
        assert ours == theirs


@pytest.mark.gpu
def test_on_a_gpu_updates_are_bitwise_the_same_and_the_moments_are_not_there(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", 1000)  # many pieces in flight
    device = torch.device("cuda")
    found = []
    for optim in (OFFLOAD, RESIDENT):
        model = tiny.build_model(dtype=torch.float32).to(device)
        mesh = tiny.Mesh(0, 1, device)
        trainer = tiny.build_trainer(model, tiny.Rows(), mesh=mesh, optim=optim, train=TrainConfig(precision="fp32"))
        gradients = torch.Generator(device).manual_seed(0)
        for step in range(20):  # gradients of our own: those of a GPU's products may differ from run to run
            for p in trainer.backend.parameters:
                p.grad = torch.randn(p.shape, device=device, generator=gradients)
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            trainer.optimizer.step()
        found.append({name: tensor.cpu() for name, tensor in everything(trainer).items()})
        if optim.offload:
            moments = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
            assert all(moment.is_pinned() for moment in moments)
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())
