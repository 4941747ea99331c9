"""The objective of pretraining: the sum over the valid targets, and the z-loss, against their definitions by hand."""

from pathlib import Path

import pytest
import torch

import tiny
from regpt.config import RunConfig
from regpt.data.batch import Batch
from regpt.errors import UsageError
from regpt.model.ops import IGNORE_INDEX
from regpt.parallel.mesh import open_mesh
from regpt.runs.pretrain import pretrain
from regpt.train.config import TrainConfig
from regpt.train.objective import NextToken


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """-ln of the softmax at each valid target, one after another."""
    nats, logits = 0.0, logits.detach()
    for scores, target in zip(logits.flatten(0, 1), targets.flatten().tolist()):
        if target != IGNORE_INDEX:
            nats -= float(torch.log(scores.exp()[target] / scores.exp().sum()))
    return nats


@pytest.mark.parametrize("pad_vocab", [True, False])
def test_it_is_the_sum_over_the_valid_targets(pad_vocab: bool):
    model, (idx, targets) = tiny.build_model(pad_vocab=pad_vocab), tiny.Rows().rows(0)
    assert (targets == IGNORE_INDEX).any()
    assert tiny.loss_sum(model, idx, targets).item() == pytest.approx(by_hand(model(idx), targets), rel=1e-12)


def test_positions_and_document_lengths_reach_the_model():
    model, (idx, targets) = tiny.build_model(), tiny.Rows().rows(0)
    idx, targets = idx[:1], targets[:1]
    documents = {
        "positions": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]),
        "cu_seqlens": torch.tensor([0, 5, 12]),
    }
    alone = sum(by_hand(model(idx[:, part]), targets[:, part]) for part in (slice(0, 5), slice(5, 12)))
    assert tiny.loss_sum(model, idx, targets, **documents).item() == pytest.approx(alone, rel=1e-12)
    assert abs(tiny.loss_sum(model, idx, targets).item() - alone) > 1e-3


def test_it_is_float32_under_autocast():
    model, (idx, targets) = tiny.build_model(dtype=torch.float32), tiny.Rows().rows(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny.loss_sum(model, idx, targets).dtype == torch.float32


# ---- z-loss ----------------------------------------------------------------------------------------------------------

Z = TrainConfig(precision="fp64", z_loss=0.1)


@pytest.mark.parametrize("pad_vocab", [True, False])
def test_the_z_loss_is_the_square_of_the_log_partition_of_valid_targets(pad_vocab: bool):
    model, (idx, targets) = tiny.build_model(pad_vocab=pad_vocab), tiny.Rows().rows(0)
    loss, extras = NextToken(model, z_loss=0.1).loss_sum(Batch(idx, targets))
    log_z = model(idx).exp().sum(-1).log()[targets != IGNORE_INDEX]
    expected = 0.1 * log_z.square().sum()
    assert extras["z_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.item() == pytest.approx(by_hand(model(idx), targets) + expected.item(), rel=1e-12)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    plain = tiny.loss_sum(model, idx, targets) + expected
    for ours, theirs in zip(grads, torch.autograd.grad(plain, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_validation_is_without_the_z_loss():
    model, (idx, targets) = tiny.build_model(), tiny.Rows().rows(0)
    with torch.no_grad():
        loss, extras = NextToken(model, z_loss=0.1).loss_sum(Batch(idx, targets))
    assert (loss.item(), extras) == (tiny.loss_sum(model, idx, targets).item(), {})


def z_rows(micro_batch_rows: int = 8, mesh: tiny.Mesh = tiny.ALONE) -> list[dict]:
    loader = tiny.Rows(micro_batch_rows=micro_batch_rows, dp_rank=mesh.rank, dp_size=mesh.world_size)
    trainer = tiny.build_trainer(tiny.build_model(), loader, mesh=mesh, train=Z)
    return [tiny.update(trainer) for _ in range(2)]


def z_rows_of_rank() -> list[dict]:
    with open_mesh("cpu") as mesh:
        rows = z_rows(2, mesh)
        mesh.wait()
        return rows


def test_the_z_loss_is_the_same_however_the_batch_is_split():
    whole = z_rows()
    for other in (z_rows(1), tiny.in_processes(2, z_rows_of_rank)[0]):
        for one, two in zip(whole, other):
            for key in ("loss", "z_loss", "grad_norm"):
                assert two[key] == pytest.approx(one[key], rel=1e-12)


def test_a_run_logs_its_z_loss_next_to_the_loss(config: RunConfig, tmp_path: Path):
    assert pretrain(tiny.change(config, "train", steps=2, z_loss=1e-3), tmp_path / "run", quiet=True) == 0
    rows = tiny.rows_of(tmp_path / "run", "train")
    assert all(0 < row["z_loss"] < row["loss"] for row in rows)


def test_a_z_loss_on_fused_kernels_is_refused(config: RunConfig, tmp_path: Path):
    fused = tiny.change(config, "train", z_loss=1e-3, kernels="fused")
    with pytest.raises(UsageError, match=r"z_loss needs plain kernels, train.kernels is fused; set --train.kernels"):
        pretrain(fused, tmp_path / "run", quiet=True)


# ---- another objective -----------------------------------------------------------------------------------------------


class Smoothed:
    """Label smoothing (Szegedy et al. 2016), as a user would add it: these lines, and one name in `runs/build.py`."""

    def __init__(self, model: torch.nn.Module, share: float):
        self.model, self.share = model, share
        self.units = NextToken(model).units

    def loss_sum(self, batch: Batch):
        log_p = self.model(batch.idx, positions=batch.positions).log_softmax(-1)
        valid = batch.targets != IGNORE_INDEX
        nats = -log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0][valid].sum()
        even = -log_p.mean(-1)[valid].sum()
        return (1 - self.share) * nats + self.share * even, {"cross_entropy": nats.detach()}


def test_another_objective_is_trained_by_the_same_step(config: RunConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("regpt.runs.build.NextToken", lambda model, *_: Smoothed(model, 0.2))
    assert pretrain(config, tmp_path / "run", quiet=True) == 0
    rows = tiny.rows_of(tmp_path / "run", "train")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]
    assert rows[0]["cross_entropy"] != rows[0]["loss"]
