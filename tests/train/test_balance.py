"""Loads of experts and what evens them out: by hand, split every way, recomputed, resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from regpt.config import RunConfig
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.errors import UsageError
from regpt.model.experts import LlamaOfExperts
from regpt.parallel.mesh import open_mesh
from regpt.runs.pretrain import pretrain, resume
from regpt.train.balance import make_balance
from regpt.train.config import TrainConfig
from regpt.train.objective import NextToken
from regpt.train.recompute import recompute_blocks

CONFIG = replace(tiny.CONFIG, family="mixtral", n_inner=13, n_expert=4)
BIASED = replace(CONFIG, expert_bias=True)
LOSSES = TrainConfig(precision="fp64", balance_loss=0.3, router_z_loss=0.1)
BIAS = TrainConfig(precision="fp64", balance="bias", balance_rate=0.01)


def counted(routes: list[Any], valid: torch.Tensor) -> list[list[int]]:
    """Tokens of each expert, one after another."""
    return [
        [
            sum(expert in row for row, v in zip(one.chosen.tolist(), valid.flatten().tolist()) if v)
            for expert in range(4)
        ]
        for one in routes
    ]


def test_the_losses_are_the_papers_over_valid_targets():
    model, (idx, targets) = tiny.build_model(config=CONFIG), tiny.Rows().rows(0)
    valid, routes = targets != IGNORE_INDEX, []
    hidden = model.hidden(idx, routes=routes)
    balance = make_balance(model, LOSSES)
    assert balance is not None
    assert not valid.all()
    balance.shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * CONFIG.n_layer, dtype=torch.float64)
    even = squares = 0.0
    for one in routes:
        scores = one.logits.exp()
        p = scores / scores.sum(-1, keepdim=True)
        for t in valid.flatten().nonzero()[:, 0].tolist():
            even = even + 4 * sum(f * p[t, e] for e, f in enumerate([0.4, 0.3, 0.2, 0.1]))
            squares = squares + scores[t].sum().log() ** 2
    L = CONFIG.n_layer
    expected = {"balance_loss": 0.3 / L * even, "router_z_loss": 0.1 / L * squares}
    loss, extras = NextToken(model, balance=balance).loss_sum(Batch(idx, targets))
    for name, one in expected.items():
        torch.testing.assert_close(extras[name], torch.as_tensor(one).detach(), rtol=1e-12, atol=0)
    assert extras["expert_counts"].tolist() == counted(routes, valid)
    plain = model.ops.linear_cross_entropy(
        hidden.flatten(0, 1), model.head_weight, targets.flatten(), CONFIG.vocab_size
    ) + sum(expected.values())
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_validation_is_the_cross_entropy_alone():
    model, (idx, targets) = tiny.build_model(config=CONFIG), tiny.Rows().rows(0)
    with torch.no_grad():
        loss, extras = NextToken(model, balance=make_balance(model, LOSSES)).loss_sum(Batch(idx, targets))
    assert (loss.item(), extras) == (tiny.loss_sum(model, idx, targets).item(), {})


def steps(train: TrainConfig, rows: int = 8, mesh: tiny.Mesh = tiny.ALONE, *, recompute: bool = False) -> list[Any]:
    """Rows of three updates, and the counts and biases after them."""
    loader = tiny.Rows(micro_batch_rows=rows, dp_rank=mesh.rank, dp_size=mesh.world_size)
    model = tiny.build_model(config=BIASED if train.balance == "bias" else CONFIG)
    trainer = tiny.build_trainer(recompute_blocks(model) if recompute else model, loader, mesh=mesh, train=train)
    made, balance = [tiny.update(trainer) for _ in range(3)], trainer.balance
    assert balance is not None
    biases = [p.tolist() for name, p in model.named_parameters() if name.endswith("gate.bias")]
    return [made, balance.counts.tolist(), biases]


def steps_of_rank(train: TrainConfig) -> list[Any]:
    with open_mesh("cpu") as mesh:
        found = steps(train, 2, mesh)
        mesh.wait()
        return found


@pytest.mark.parametrize("train", [LOSSES, BIAS], ids=["loss", "bias"])
def test_losses_loads_and_biases_do_not_depend_on_how_the_batch_is_split(train: TrainConfig):
    """Unequally masked rows: the last has no targets."""
    made, counts, biases = steps(train)
    for others, their_counts, their_biases in (
        *(steps(train, rows) for rows in (1, 2, 4)),
        *tiny.in_processes(2, steps_of_rank, train),
    ):
        assert their_counts == counts
        assert their_biases == biases
        for one, two in zip(made, others):
            assert two["expert_load"] == one["expert_load"]
            for key in {"loss", "balance_loss", "router_z_loss", "grad_norm"} & one.keys():
                assert two[key] == pytest.approx(one[key], rel=1e-12)


def test_recomputed_blocks_count_nothing_twice():
    keys = ("loss", "balance_loss", "router_z_loss", "grad_norm", "expert_load", "expert_entropy")
    (plain, *rest), (again, *others) = steps(LOSSES), steps(LOSSES, recompute=True)
    assert [[row[key] for key in keys] for row in plain] == [[row[key] for key in keys] for row in again]
    assert rest == others


def test_the_loss_of_a_step_has_the_loads_of_the_one_before():
    trainer = tiny.build_trainer(tiny.build_model(config=CONFIG), tiny.Rows(), train=LOSSES)
    first = tiny.update(trainer)
    assert first["balance_loss"] == pytest.approx(0.3, rel=1e-12)  # of even loads
    balance = trainer.balance
    assert balance is not None
    torch.testing.assert_close(balance.shares, balance.counts.double() / balance.counts.sum(1, keepdim=True))
    assert abs(tiny.update(trainer)["balance_loss"] - 0.3) > 1e-3


def test_a_bias_moves_against_the_load_and_by_nothing_else():
    model = tiny.build_model(config=BIASED)
    assert isinstance(model, LlamaOfExperts)
    trainer = tiny.build_trainer(model, tiny.Rows(), train=BIAS)
    before = [router.bias.clone() for router in model.routers if router.bias is not None]
    tiny.update(trainer)
    assert trainer.balance is not None
    for router, was, counts in zip(model.routers, before, trainer.balance.counts.tolist()):
        mean = sum(counts) / 4
        moved = [0.01 if n < mean else -0.01 if n > mean else 0.0 for n in counts]
        assert router.bias is not None
        torch.testing.assert_close(router.bias - was, torch.tensor(moved, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("changes", [{"balance_loss": 3.0}, {"balance": "bias", "balance_rate": 0.02}])
def test_loads_become_more_even_than_without(changes: dict[str, Any]):
    """From a router that prefers one expert; means of the last ten of thirty steps."""

    def load(**changes: Any) -> float:
        biased = "balance" in changes
        model = tiny.build_model(config=BIASED if biased else CONFIG)
        for name, p in model.named_parameters():
            if name.endswith(("gate.bias", "gate.weight")):
                p.data[0] = 3 * p.data[0].abs()
        train = TrainConfig(precision="fp64", **{"balance_loss": 0.0, **changes})
        trainer = tiny.build_trainer(model, tiny.Rows(), train=train)
        return sum(sum(tiny.update(trainer)["expert_load"]) * (step >= 20) for step in range(30))

    assert load(**changes) < 0.95 * load(**{**changes, "balance_rate": 0.0, "balance_loss": 0.0})


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_logs_loads_and_resumes_bitwise(balance: str, config: RunConfig, tmp_path: Path):
    config = tiny.change(config, "model", family="mixtral", n_inner=8, n_expert=4, expert_bias=balance == "bias")
    config = tiny.change(config, "train", steps=4, balance=balance, balance_rate=0.01, deterministic=True)
    config = tiny.change(config, "checkpoint", every_steps=2)
    assert pretrain(config, tmp_path / "run", quiet=True) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000004")
    assert resume(tmp_path / "cut") == 0
    rows = tiny.rows_of(tmp_path / "run", "train")
    layers = config.model.n_layer
    assert all(len(row["expert_load"]) == len(row["expert_entropy"]) == layers for row in rows)
    assert all(1 <= load <= 4 for row in rows for load in row["expert_load"])
    last = [tmp_path / name / "checkpoints" / "step-00000004" for name in ("run", "cut")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in last}) == 1
    states = [json.loads((folder / "state.json").read_text())["trainer"]["balance"] for folder in last]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("model", "train", "sentence"),
    [
        (tiny.CONFIG, BIAS, "train.balance is for experts, but gpt2 has none"),
        (tiny.CONFIG, LOSSES, "train.router_z_loss is for experts, but gpt2 has none"),
        (tiny.CONFIG, TrainConfig(balance_loss=0.1), "train.balance_loss is for experts, but gpt2 has none"),
        (tiny.CONFIG, TrainConfig(balance_rate=0.1), "train.balance_rate is for experts, but gpt2 has none"),
        (CONFIG, BIAS, "train.balance is bias and model.expert_bias false"),
        (BIASED, LOSSES, "train.balance is loss and model.expert_bias true"),
    ],
)
def test_what_a_model_has_not_is_refused_in_one_sentence(model: Any, train: TrainConfig, sentence: str):
    with pytest.raises(UsageError, match=sentence) as refused:
        make_balance(tiny.build_model(config=model), train)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("counts", [[[1, 2]], [[-1, 0, 0, 0]] * CONFIG.n_layer, "x"])
def test_a_damaged_state_is_refused(counts: Any):
    balance = make_balance(tiny.build_model(config=CONFIG), LOSSES)
    assert balance is not None
    with pytest.raises((ValueError, TypeError)):
        balance.load_state({"counts": counts})
