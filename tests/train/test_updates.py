"""The size of updates beside the weights: right for any optimizer, and without an effect on training."""

import pytest
import torch
from torch import nn

import tiny
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.train.updates import UpdateRatios, kind
from tiny import ALONE, CPU, Rows, build_model, build_trainer, in_processes


def test_kinds_are_names_without_block_and_number():
    names = ["h.3.attn.c_attn.weight", "h.11.attn.c_attn.weight", "wte.weight", "layers.0.mlp.up.lora_A"]
    assert [kind(name) for name in names] == ["attn.c_attn", "attn.c_attn", "wte", "mlp.up.lora_A"]


def by_hand(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """‖Δw‖ / ‖w‖ of each kind, and of everything under ``."""
    found = {}
    for wanted in {kind(name) for name in before} | {""}:
        names = [name for name in before if before[name].dim() >= 2 and wanted in ("", kind(name))]
        if names:
            old = torch.cat([before[name].flatten() for name in names])
            new = torch.cat([after[name].flatten() for name in names])
            found[wanted] = ((new - old).norm() / old.norm()).item()
    return found


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_the_ratio_is_that_of_the_weights_before_and_after(make):
    model = build_model()
    optimizer = make(model.parameters(), lr=0.01)
    ratios = UpdateRatios(model, optimizer, ALONE, lambda: True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    measured = ratios.take()
    assert measured is not None
    expected = by_hand(before, dict(model.named_parameters()))
    assert measured["ratio"] == pytest.approx(expected.pop(""), rel=1e-5)
    assert measured["ratios"] == pytest.approx(expected, rel=1e-5)
    assert ratios.take() is None


def test_only_due_steps_are_measured():
    trainer = build_trainer(build_model(), Rows())
    ratios = UpdateRatios(trainer.model, trainer.optimizer, ALONE, lambda: (trainer.step + 1) % 2 == 0)
    taken = []
    for _ in range(4):
        tiny.update(trainer)
        taken.append(ratios.take() is not None)
    assert taken == [False, True, False, True]
    assert ratios.before is None


def test_measuring_changes_nothing():
    trained = []
    for measured in (False, True):
        trainer = build_trainer(build_model(), Rows())
        if measured:
            UpdateRatios(trainer.model, trainer.optimizer, ALONE, lambda: True)
        for _ in range(3):
            tiny.update(trainer)
        trained.append(dict(trainer.model.named_parameters()))
    for name, p in trained[0].items():
        assert torch.equal(p, trained[1][name]), name


def test_weights_that_are_zero_have_no_ratio():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ratios = UpdateRatios(model, optimizer, ALONE, lambda: True)
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert ratios.take() == {"ratio": None, "ratios": {"weight": None}}


def test_frozen_parameters_and_vectors_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    assert [p.shape for p in UpdateRatios(model, optimizer, ALONE, lambda: True).parameters] == [(3, 2)]


def measure_part() -> dict:
    """What a process measures that holds half of the rows of a matrix."""
    with open_mesh("cpu") as mesh:
        return measured_rows(mesh, 4 // mesh.world_size)


def measured_rows(mesh: Mesh, rows: int) -> dict:
    model = nn.Linear(3, rows, bias=False)
    with torch.no_grad():
        whole = torch.arange(12, dtype=torch.float32).view(4, 3) + 1
        model.weight.copy_(whole[mesh.rank * rows :][:rows])
        model.weight.grad = whole[mesh.rank * rows :][:rows].square()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ratios = UpdateRatios(model, optimizer, mesh, lambda: True)
    optimizer.step()
    return ratios.take() or {}


def test_parts_of_a_parameter_in_several_processes_make_one_ratio():
    alone = measured_rows(Mesh(0, 1, CPU), 4)
    for part in in_processes(2, measure_part):
        assert part["ratio"] == pytest.approx(alone["ratio"], rel=1e-6)
