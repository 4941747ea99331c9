"""Number formats: what is computed in which, and that weights and gradients stay as they are."""

import pytest
import torch

import tiny
from regpt.model.weights import state_tensors
from regpt.train.config import TrainConfig
from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision, writing


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "product", "allowed"),
    [
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "high"),
        ("fp8", torch.bfloat16, "high"),
    ],
)
def test_a_product_is_computed_in_the_chosen_format(matmul_precision, precision, product, allowed: str):
    assert parameter_dtype(precision) == torch.float32
    x = torch.ones(2, 2)
    with autocast(precision, tiny.CPU):
        assert (x @ x).dtype == product
    assert (x @ x).dtype == torch.float32
    set_matmul_precision(precision)
    assert torch.get_float32_matmul_precision() == allowed


def test_float64_is_float64_throughout():
    assert parameter_dtype("fp64") == torch.float64
    found = tiny.step_gradients(tiny.build_trainer(tiny.build_model(), tiny.Rows()))
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}


def test_bfloat16_rounds_products_and_nothing_that_is_kept():
    trainer = tiny.build_trainer(
        tiny.build_model(dtype=torch.float32), tiny.Rows(micro_batch_rows=4), train=TrainConfig(precision="bf16")
    )
    found = tiny.step_gradients(trainer)
    exact = tiny.step_gradients(tiny.build_trainer(tiny.build_model(), tiny.Rows()))
    assert {tensor.dtype for name, tensor in found.items() if name not in ("loss", "norm")} == {torch.float32}
    error = tiny.largest_error({name: tensor.double() for name, tensor in found.items()}, exact)
    assert 1e-4 < error < 0.1  # bfloat16 has eight bits; a loss that was rounded to it would be off by 1e-3 and more
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-3)
    tiny.update(trainer)
    assert {w.dtype for w in state_tensors(trainer.model).values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "precision", "held", "under_autocast"),
    [
        ("cpu", "fp32", torch.float32, False),
        ("cpu", "fp64", torch.float64, False),
        ("cpu", "bf16", torch.float32, True),
        ("cuda", "bf16", torch.bfloat16, False),
        ("cuda", "fp16", torch.float16, False),
        ("cuda", "tf32", torch.float32, False),
    ],
)
def test_weights_that_write_texts_have_sixteen_bits_on_cuda(device, precision, held, under_autocast):
    model = torch.nn.Linear(2, 2)
    with writing(model, precision, torch.device(device)):
        assert torch.is_autocast_enabled("cpu") == under_autocast
    assert model.weight.dtype == held
