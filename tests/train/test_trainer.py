"""The trainer: its loss and gradients, what it refuses, and the order in which things happen."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tiny
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.errors import UserError
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize, state_tensors
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.objective import valid_targets
from regpt.train.peak import device_peak
from regpt.train.trainer import Row, due


class Same(tiny.Rows):
    """The rows of step 0 again and again, every target valid."""

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        idx, _ = self.rows(0)
        return [Batch(idx, idx.roll(-1, dims=1))]


def number(row: Row, key: str) -> float:
    value = row[key]
    assert isinstance(value, float)
    return value


def test_one_batch_is_learnt_by_heart():
    model = initialize(make_model(tiny.CONFIG), seed=1)
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=10, weight_decay=0.0)
    trainer = tiny.build_trainer(model, Same(), train=TrainConfig(precision="fp32"), optim=optim)
    losses = [number(tiny.update(trainer), "loss") for _ in range(120)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.1)
    assert losses[-1] < 0.05


# ---- loss and gradients ----------------------------------------------------------------------------------------------


def gradients(micro_batch_rows: int, **options) -> dict[str, torch.Tensor]:
    model = tiny.build_model(**options)
    return tiny.step_gradients(tiny.build_trainer(model, tiny.Rows(micro_batch_rows=micro_batch_rows)))


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_gradients_do_not_depend_on_how_the_batch_is_split(micro_batch_rows: int):
    """Its micro-batches have unequally many valid targets, one has none."""
    assert tiny.largest_error(gradients(micro_batch_rows), gradients(8)) < 1e-12


def test_averaging_over_micro_batches_would_be_seen():
    """The mistake that the rule avoids is a large one on these rows, so the test above can fail."""
    model, (*batches, _) = tiny.build_model(), tiny.Rows(micro_batch_rows=1).step(0)  # the last has no target: 0/0
    loss_sum = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
    for batch in batches:
        (loss_sum(batch) / valid_targets([batch]) / len(batches)).backward()
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    right = {name: g[: len(wrong[name])] for name, g in gradients(8).items() if name in wrong}
    wrong["wte.weight"] = wrong["wte.weight"][:97]
    assert tiny.largest_error(wrong, right) > 0.1


def test_the_loss_is_the_mean_over_the_valid_targets_of_the_whole_batch():
    model, loader = tiny.build_model(), tiny.Rows(micro_batch_rows=2)
    idx, targets = loader.rows(0)
    assert 0 < (targets == IGNORE_INDEX).sum() < targets.numel()
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = tiny.step_gradients(tiny.build_trainer(model, loader))
    assert found.pop("loss").item() == pytest.approx(loss.item(), rel=1e-12)
    norm = torch.stack([g.norm() for g in expected]).norm().item()
    assert found.pop("norm").item() == pytest.approx(norm, rel=1e-12)
    names = [name for name, _ in model.named_parameters()]
    by_hand = {name: g[: len(found[name])] for name, g in zip(names, expected)}
    assert tiny.largest_error(found, by_hand) < 1e-11


def test_padding_changes_no_gradient_and_stays_zero():
    assert tiny.largest_error(gradients(4), gradients(4, pad_vocab=False)) < 1e-12
    padded, real = (tiny.build_trainer(tiny.build_model(pad_vocab=pad), tiny.Rows()) for pad in (True, False))
    for _ in range(5):
        ours, theirs = tiny.update(padded), tiny.update(real)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
        assert (padded.model.wte.weight[97:] == 0).all()
    assert len(padded.model.wte.weight) == 128
    # The key bias has no gradient but rounding (softmax ignores it), which AdamW makes larger.
    assert tiny.largest_error(state_tensors(padded.model), state_tensors(real.model)) < 1e-9


@pytest.mark.parametrize("grad_clip", [0.05, 1e6])
def test_clipping_bounds_the_norm_and_reports_the_one_before(grad_clip: float):
    free = gradients(8)
    trainer = tiny.build_trainer(
        tiny.build_model(), tiny.Rows(), train=TrainConfig(grad_clip=grad_clip, precision="fp64")
    )
    _, norm, _ = trainer.gradients()
    assert norm == pytest.approx(free["norm"].item(), rel=1e-12)
    clipped = torch.stack([p.grad.norm() for p in trainer.backend.parameters if p.grad is not None]).norm().item()
    assert clipped == pytest.approx(min(grad_clip, norm), rel=1e-4)


def test_each_update_starts_from_zero_gradients_and_takes_its_own_learning_rate():
    optim = OptimConfig(lr=1e-2, warmup_steps=3, schedule="constant")
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(), optim=optim)
    for step, lr in enumerate([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2], start=1):
        before = tiny.step_gradients(tiny.build_trainer(copied(trainer.model), Shifted(step - 1)))
        row = tiny.update(trainer)
        assert row["step"] == trainer.step == step
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row["loss"] == pytest.approx(before["loss"].item(), rel=1e-12)
        assert row["grad_norm"] == pytest.approx(before["norm"].item(), rel=1e-12)
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {row["lr"]}


class Shifted(tiny.Rows):
    """The rows from step `first` on."""

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        return super().step(step + self.first, micro_batch_rows)


def copied(model: Transformer) -> Transformer:
    copy = make_model(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_row_of_metrics_counts_tokens_flops_and_time():
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows())
    tiny.update(trainer)
    row = tiny.update(trainer)
    assert row["tokens"] == 2 * 8 * 12
    assert row["flops"] == 2 * 8 * 12 * trainer.flops_per_token
    assert row["tokens_per_s"] == pytest.approx(8 * 12 * 1e3 / number(row, "dt_ms"))
    seconds = number(row, "dt_ms") / 1e3
    peak = device_peak(tiny.CPU, "fp64").flops
    assert row["mfu"] == pytest.approx(8 * 12 * trainer.flops_per_token / seconds / peak)
    assert list(row)[:5] == ["kind", "step", "loss", "lr", "grad_norm"]
    assert row["kind"] == "train"


def test_training_draws_nothing_from_the_global_generator():
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows())
    before = torch.get_rng_state()
    tiny.update(trainer)
    assert torch.get_rng_state().equal(before)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


class Poisoned(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * math.inf


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda loss: loss * math.nan, "the loss is nan"),
        (Poisoned.apply, "the gradient norm (inf|nan)"),
    ],
    ids=["loss", "norm"],
)
def test_a_loss_or_norm_that_is_not_finite_stops_before_the_update(spoil: Callable, sentence: str):
    model = tiny.build_model()
    good = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
    trainer = tiny.build_trainer(
        model, tiny.Rows(), loss_sum=lambda batch: spoil(good(batch)) if trainer.step == 2 else good(batch)
    )
    tiny.update(trainer)
    tiny.update(trainer)
    weights = {name: w.clone() for name, w in state_tensors(model).items()}
    moments = {p: state["exp_avg"].clone() for p, state in trainer.optimizer.state.items()}
    with pytest.raises(UserError, match=rf"step 3: .*{sentence}.*not applied.*lower --optim\.lr"):
        tiny.update(trainer)
    assert trainer.step == 2
    assert all(w.equal(weights[name]) for name, w in state_tensors(model).items())
    assert all(trainer.optimizer.state[p]["exp_avg"].equal(m) for p, m in moments.items())


# ---- the loop --------------------------------------------------------------------------------------------------------


def fitted(steps: int, every: dict[str, int], *, stop_after: int = -1, start: int = 0) -> tuple[bool, str]:
    """What `fit` returned, and what it did: u3 update, v validate, s sample, c checkpoint, with the updates made."""
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(), train=TrainConfig(steps=steps, precision="fp64"))
    trainer.step = start
    did = []
    do = SimpleNamespace(
        log=lambda row: did.append(f"u{row['step']}"),
        validate=lambda step: did.append(f"v{step}"),
        sample=lambda step: did.append(f"s{step}"),
        save=lambda step: did.append(f"c{step}"),
        stop_requested=lambda: trainer.step == stop_after,
    )
    return trainer.fit(do, **every), " ".join(did)


def test_things_happen_in_their_order():
    everything = {"validate_every": 2, "sample_every": 3, "save_every": 4}
    assert fitted(6, everything) == (True, "v0 s0 u1 u2 v2 u3 s3 u4 c4 v4 u5 u6 c6 v6 s6")


def test_at_the_end_everything_happens_whatever_the_intervals():
    assert fitted(2, {}) == (True, "u1 u2 c2 v2 s2")
    assert fitted(2, dict.fromkeys(("validate_every", "sample_every", "save_every"), 5)) == (
        True,
        "v0 s0 u1 u2 c2 v2 s2",
    )


def test_a_stop_saves_at_once_and_what_it_left_out_is_made_up_for():
    everything = {"validate_every": 2, "sample_every": 3, "save_every": 4}
    assert fitted(6, everything, stop_after=2) == (False, "v0 s0 u1 u2 c2")
    assert fitted(6, everything, start=2) == (True, "v2 u3 s3 u4 c4 v4 u5 u6 c6 v6 s6")


def test_a_stop_after_the_last_update_changes_nothing():
    assert fitted(2, {"validate_every": 1}, stop_after=2) == (True, "v0 u1 v1 u2 c2 v2 s2")


def test_a_step_without_a_target_says_so():
    class Masked(tiny.Rows):
        def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
            return [
                Batch(b.idx, torch.full_like(b.targets, IGNORE_INDEX)) for b in super().step(step, micro_batch_rows)
            ]

    trainer = tiny.build_trainer(tiny.build_model(), Masked())
    before = [p.detach().clone() for p in trainer.backend.parameters]
    with pytest.raises(UserError, match="step 1: no target carries loss"):
        tiny.update(trainer)
    assert all(torch.equal(p, q) for p, q in zip(trainer.backend.parameters, before))


def test_due():
    assert [step for step in range(7) if due(step, 3)] == [0, 3, 6]
    assert not any(due(step, 0) for step in range(7))
