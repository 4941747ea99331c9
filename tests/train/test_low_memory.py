"""Weights in bfloat16, moments in bfloat16 and 8 bits: against torch's and torchao's AdamW, and over whole runs."""

import logging
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint
from regpt.errors import UsageError, UserError
from regpt.model.weights import initialize, state_tensors
from regpt.runs.pretrain import pretrain, resume
from regpt.train import low_memory
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.low_memory import LowMemoryAdamW
from regpt.train.optim import load_optimizer, make_optimizer, optimizer_tensors
from regpt.train.trainer import Trainer

BF16 = torch.bfloat16
BF16_TRAIN = TrainConfig(precision="bf16", weight_dtype="bf16")
NEEDS_TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
# Wide enough for rows of 256 numbers, which 8 bits need.
WIDE = tiny.replace(tiny.FAMILY_CONFIGS["llama"], n_layer=1, n_head=2, n_kv_head=1, n_embd=256, n_inner=256)
COMBINATIONS = [
    {},
    {"state_dtype": "bf16"},
    {"state_dtype": "bf16", "offload": True},
    {"offload": True},
    pytest.param({"state_dtype": "int8"}, marks=NEEDS_TORCHAO),
]


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("torchao").setLevel(logging.ERROR)


def trainer_with(optim: dict, train: TrainConfig = BF16_TRAIN, config=WIDE, rows: int = tiny.N_ROWS) -> Trainer:
    dtype = torch.float32 if train.weight_dtype == "fp32" else BF16
    model = tiny.build_model(dtype=dtype, config=config)
    loader = tiny.Rows(config=config, micro_batch_rows=rows)
    return tiny.build_trainer(model, loader, optim=tiny.replace(tiny.OPTIM, lr=1e-3, **optim), train=train)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return state_tensors(trainer.model) | optimizer_tensors(trainer.model, trainer.optimizer)


@pytest.mark.parametrize("optim", COMBINATIONS, ids=str)
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_it_learns_as_float32_does(optim: dict, weights: str):
    train = TrainConfig(precision="bf16", weight_dtype=weights)  # type: ignore[arg-type]
    losses = {}
    for name, trainer in {
        "ours": trainer_with(optim, train),
        "exact": trainer_with({}, TrainConfig(precision="fp32")),
    }.items():
        trainer.loader.step = lambda step, rows=None, step_of=trainer.loader.step: step_of(0, rows)  # one batch
        losses[name] = [tiny.update(trainer)["loss"] for _ in range(30)]
    fallen = losses["exact"][0] - losses["exact"][-1]
    assert fallen > 1
    assert losses["ours"][-1] == pytest.approx(losses["exact"][-1], abs=0.05 * fallen)


@pytest.mark.parametrize("optim", COMBINATIONS, ids=str)
def test_state_that_was_saved_goes_on_bitwise(optim: dict):
    straight, begun, again = (trainer_with(optim) for _ in range(3))
    for _ in range(2):
        tiny.update(begun)
    stored = {name: tensor.clone() for name, tensor in everything(begun).items()}
    with torch.no_grad():
        for mine, other in zip(again.model.parameters(), begun.model.parameters()):
            mine.copy_(other)
    load_optimizer(again.model, again.optimizer, stored, step=2)
    again.step = 2
    for _ in range(4):
        tiny.update(straight)
    for _ in range(2):
        tiny.update(again)
    expected = everything(straight)
    assert all(tensor.equal(expected[name]) for name, tensor in everything(again).items())
    assert all(p.dtype == BF16 for p in again.model.parameters())


def test_offloaded_moments_are_bitwise_the_same():
    for state_dtype in ("fp32", "bf16"):
        ours, theirs = (trainer_with({"state_dtype": state_dtype, "offload": offload}) for offload in (True, False))
        for _ in range(3):
            assert tiny.update(ours)["loss"] == tiny.update(theirs)["loss"]
        expected = everything(theirs)
        assert all(tensor.equal(expected[name]) for name, tensor in everything(ours).items())


def test_padding_changes_no_bit():
    """Rows of padding come last in a parameter: no other element has another number for them."""
    found = []
    for pad in (True, False):
        model = tiny.build_model(dtype=BF16, config=WIDE, pad_vocab=pad)
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2, state_dtype="bf16"), tiny.CPU)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            p.grad[: min(len(p), 97)] = 0.25
        optimizer.step()
        found.append(state_tensors(model) | optimizer_tensors(model, optimizer))
        padding = model.head_weight[97:]
        assert not padding.any()
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


@NEEDS_TORCHAO
def test_in_8_bits_codes_scales_and_weights_are_those_of_torchao():
    """Their update without their compiler; float32 weights, since they draw their bits from the global generator."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    model = initialize(tiny.build_model(dtype=torch.float32, config=WIDE), 0)
    optim = OptimConfig(lr=1e-3, state_dtype="int8")
    optimizer = make_optimizer(model, optim, tiny.CPU)
    assert isinstance(optimizer, LowMemoryAdamW)
    p = model.get_parameter("layers.0.mlp.up_proj.weight")
    theirs, state = p.detach().clone(), optimizer.state[p]
    moments = [OptimState8bit.zeros(p.shape, signed, 256, dtype=torch.float32) for signed in (True, False)]
    for step in range(1, 6):
        for each in model.parameters():
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
        optimizer.step()
        given = torch.tensor(optim.lr), optim.beta1, optim.beta2, optim.weight_decay, optim.eps, True, False
        single_param_adam(theirs, p.grad, torch.tensor(float(step)), *moments, None, *given)
    torch.testing.assert_close(p.detach(), theirs, rtol=1e-5, atol=1e-7)
    for name, moment in zip(low_memory.MOMENTS, moments):
        assert (state[name].int() - moment.codes.int()).abs().max() <= 1
        assert (state[name] != moment.codes).double().mean() < 1e-3
        torch.testing.assert_close(state[name + "_scale"].view(-1), moment.scale, rtol=1e-5, atol=0)


@NEEDS_TORCHAO
def test_what_8_bits_hold_and_what_stays_float32():
    trainer = trainer_with({"state_dtype": "int8"}, config=replace(WIDE, n_inner=300))
    kinds = {name: trainer.optimizer.state[p]["exp_avg"].dtype for name, p in trainer.model.named_parameters()}
    assert kinds["layers.0.mlp.up_proj.weight"] == torch.uint8  # rows of 256
    assert kinds["layers.0.mlp.down_proj.weight"] == torch.float32  # of 300
    assert kinds["norm.weight"] == torch.float32  # few


def test_without_torchao_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(low_memory, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'regpt\[lowmem\]'"):
        trainer_with({"state_dtype": "int8"})


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_micro_batches_are_summed_in_float32():
    """In bfloat16 the sum of many small addends stops growing: 256 of 1 become 256 and stay there."""
    found = {}
    for dtype in ("fp32", "bf16"):
        trainer = trainer_with({}, replace(BF16_TRAIN, grad_dtype=dtype), rows=1)
        backend = tiny.data_parallel(trainer)
        p = backend.parameters[0]
        grad_dtype = torch.float32 if dtype == "fp32" else BF16
        again = type(backend)(lambda batch, p=p: (p.sum(), {}), [p], trainer.mesh, grad_dtype=grad_dtype)
        again.forward_backward(trainer.loader.step(0, 1) * 128, torch.ones(()))
        found[dtype] = p.grad.double().mean().item()
    assert found == {"fp32": 1024.0, "bf16": 256.0}


@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16])
def test_gradients_are_clipped_by_a_float32_norm(grad_dtype: torch.dtype):
    trainer = trainer_with({})
    backend = tiny.data_parallel(trainer)
    backend = type(backend)(backend.loss_sum, backend.parameters, trainer.mesh, grad_dtype=grad_dtype)
    exact = 0.0
    for number, p in enumerate(backend.parameters):
        p.grad = torch.full_like(p, 1.0 + number / 128, dtype=grad_dtype)
        exact += p.grad.double().square().sum().item()
    norm = backend.sum_gradients()
    backend.clip(1.0, norm)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact**0.5, rel=1e-4)  # of sums in float32; bfloat16 is 4e-3 off
    clipped = sum(p.grad.double().square().sum().item() for p in backend.parameters)
    assert clipped == pytest.approx(1.0, rel=2e-4 if grad_dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("family", tiny.FAMILY_CONFIGS)
def test_every_family_computes_in_bfloat16(family: str):
    """Loss and gradients against float64 of the same weights; what is summed in bfloat16 has 8 bits."""
    config = tiny.FAMILY_CONFIGS[family]
    exact = tiny.build_model(config=config)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.to(BF16))
    model = tiny.build_model(config=config, dtype=BF16)
    loader = tiny.Rows(config=config)
    theirs = tiny.step_gradients(tiny.build_trainer(exact, loader))
    ours = tiny.step_gradients(tiny.build_trainer(model, loader, train=BF16_TRAIN))
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=5e-3)
    assert ours["norm"].item() == pytest.approx(theirs["norm"].item(), rel=5e-2)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def low_memory_run(shards: Path, **optim):
    config = tiny.change(tiny.run_config(shards), "train", precision="bf16", weight_dtype="bf16", ema_decay=0.9)
    return tiny.change(config, "optim", **optim)


@pytest.mark.parametrize("optim", COMBINATIONS, ids=str)
def test_a_run_is_resumed_bitwise_and_stores_its_types(shards, tmp_path: Path, optim: dict):
    config = tiny.change(low_memory_run(shards, **optim), "model", n_embd=256)
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert pretrain(config, straight, quiet=True) == 0
    shutil.copytree(straight, run)
    for step in (6, 8):
        shutil.rmtree(checkpoint_folder(run, step))
    assert resume(run, quiet=True) == 0
    assert tiny.final_files(run) == tiny.final_files(straight)
    checkpoint = load_checkpoint(checkpoint_folder(run, 8))
    assert set(checkpoint.weights().dtype_of.values()) == {"BF16"}
    assert set(checkpoint.average().dtype_of.values()) == {"F32"}  # type: ignore[union-attr]
    kinds = {"fp32": {"F32"}, "bf16": {"BF16"}, "int8": {"F32", "U8"}}[optim.get("state_dtype", "fp32")]
    assert set(checkpoint.optimizer().dtype_of.values()) == kinds


def weights_after_two_steps(rows: int) -> dict[str, Tensor]:
    from regpt.parallel.mesh import open_mesh

    with open_mesh("cpu") as mesh:
        model = tiny.build_model(dtype=BF16, config=WIDE)
        loader = tiny.Rows(config=WIDE, micro_batch_rows=rows, dp_rank=mesh.rank, dp_size=mesh.world_size)
        optim = tiny.replace(tiny.OPTIM, lr=1e-3, state_dtype="bf16")
        trainer = tiny.build_trainer(model, loader, optim=optim, train=BF16_TRAIN, mesh=mesh)
        for _ in range(2):
            tiny.update(trainer)
        return {name: tensor.clone() for name, tensor in everything(trainer).items()}


def test_ranks_agree_bitwise():
    one, other = tiny.in_processes(2, weights_after_two_steps, 2)
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    alone = weights_after_two_steps(tiny.N_ROWS)
    for name, tensor in alone.items():
        if not name.startswith("exp_avg"):
            torch.testing.assert_close(tensor, one[name], rtol=2**-6, atol=4e-3)


@NEEDS_TORCHAO
def test_moments_of_another_kind_are_refused_in_one_sentence():
    stored = everything(trainer_with({"state_dtype": "bf16"}))
    eight = trainer_with({"state_dtype": "int8"})
    with pytest.raises(UserError, match=r"set optim\.state_dtype as it was"):
        load_optimizer(eight.model, eight.optimizer, stored, step=2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(weight_dtype="bf16", precision="fp32"), "train.precision is fp32; set it to bf16"),
        (lambda: TrainConfig(weight_dtype="bf16", precision="fp8"), "train.precision is fp8; set it to bf16"),
        (lambda: TrainConfig(grad_dtype="bf16"), "set both to bf16, or neither"),
        (lambda: TrainConfig(weight_dtype="bf16", kernels="fused"), "trains float32 weights"),
        (
            lambda: OptimConfig(state_dtype="int8", offload=True),
            "optim.state_dtype is int8; set optim.offload to false",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(make, words: str):
    with pytest.raises(UsageError, match=words):
        make()
