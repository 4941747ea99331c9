"""Linear layers in FP8 under torch.compile: one graph, no break, nothing compiled twice."""

import shutil

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

import tiny
from kernels.test_fp8 import Rows, build, error, gradients, layer
from regpt.evals.perplexity import batch_losses, loss_sums, validation_of
from regpt.kernels import fp8
from regpt.train.config import TrainConfig
from regpt.train.recompute import recompute_blocks

pytestmark = [
    tiny.IMPORTS_COMPILER,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch does, in Dynamo
    pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU"),
]
FP8 = TrainConfig(precision="fp8")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_is_bitwise_what_it_is_uncompiled(dtype: torch.dtype):
    """A float32 input is not rounded to bfloat16 on the way by the compiler, which fuses the two casts."""
    x, weight, bias, dy = layer()

    def found(linear) -> list[Tensor]:
        given = [tensor.clone().requires_grad_() for tensor in (draw_like(x, dtype), weight, bias)]
        y = linear(*given)
        return [y.detach(), *torch.autograd.grad(y, given, dy)]

    def draw_like(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    pairs = list(zip(found(torch.compile(fp8.linear, dynamic=False)), found(fp8.linear)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    if dtype == torch.bfloat16:
        assert all(torch.equal(a, b) for a, b in pairs)
    else:
        assert max(error(a, b) for a, b in pairs) < 0.03


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_training_step_is_one_graph_and_validation_another(recomputed: bool):
    def model():
        return recompute_blocks(build("fp8")) if recomputed else build("fp8")

    exact = gradients("fp64")
    trainer = tiny.build_trainer(model(), Rows(), train=FP8, compile=True)
    found = {name: tensor.double() for name, tensor in tiny.step_gradients(trainer).items()}
    assert counters["stats"]["unique_graphs"] == 1
    plain = gradients("fp8", model=model())
    assert tiny.largest_error(found, exact) < 1.3 * tiny.largest_error(plain, exact)
    for step in range(3):
        tiny.update(trainer)
        batches = Rows().step(step)
        ours = validation_of(loss_sums(batch_losses(tiny.loss_sum_of(trainer), batches, None, tiny.CPU))).loss
        uncompiled = build("bf16")
        uncompiled.load_state_dict(trainer.model.state_dict())
        theirs = tiny.build_trainer(uncompiled, Rows(), train=TrainConfig(precision="bf16")).backend.evaluate
        assert ours == pytest.approx(
            validation_of(loss_sums(batch_losses(theirs, batches, None, tiny.CPU))).loss, rel=2e-3
        )
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
