"""When a micro-batch is captured, replayed, and neither. What stands for the graphs computes at once, in float64."""

import pytest
import torch

import tiny
from kernels import reference
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.graphs import MOST_CAPTURES, GraphedLoss
from regpt.kernels.masked import TorchAttention


class Computed:
    """What `CapturedStep` promises, without a graph; notes what was asked of it."""

    log: list[str]

    def __init__(self, fused, inputs, gradient, pool):
        self.log.append("capture" if gradient else "capture without gradient")
        self.fused, self.gradient = fused, gradient

    def forward(self, *inputs):
        self.log.append("replay")
        loss, self.state = self.fused.forward(*inputs, gradient=self.gradient)
        return loss

    def backward(self, scale):
        self.fused.backward(scale, self.state)


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(Computed, "log", [], raising=False)
    return Computed.log


def graphed(capture=Computed) -> GraphedLoss:
    model = tiny.build_model()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return GraphedLoss(
        FusedGPT2(model, reference.products, TorchAttention(), reference, torch.float64), capture, object
    )


def train(path: GraphedLoss, step: int = 0, rows: slice = slice(None)) -> None:
    idx, targets = tiny.Rows().rows(step)
    path.loss_sum(idx[rows], targets[rows]).backward()


def validate(path: GraphedLoss) -> float:
    with torch.no_grad():
        return path.loss_sum(*tiny.Rows().rows(3)).item()


def gradient(path: GraphedLoss) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in path.fused.model.parameters()])


def test_a_shape_runs_once_then_is_captured_then_replayed(log):
    path, plain = graphed(), graphed(capture=None)
    plain.captures_left = 0
    for step in range(4):
        train(path, step)
        train(plain, step)
    assert log == ["capture", "replay", "replay", "replay"]
    torch.testing.assert_close(gradient(path), gradient(plain), rtol=1e-13, atol=1e-15)


def test_a_first_call_without_gradients_in_place_is_no_rehearsal(log):
    path = graphed()
    path.fused.model.zero_grad()
    train(path)
    train(path)
    assert log == []
    train(path)
    assert log == ["capture", "replay"]


def test_validation_shares_the_pool_of_training_and_waits_for_it(log):
    path = graphed()
    values = [validate(path) for _ in range(3)]
    assert log == []
    train(path)
    train(path)
    values += [validate(path) for _ in range(2)]
    assert log == ["capture", "replay", "capture without gradient", "replay", "replay"]
    assert len(set(values)) == 1


def test_what_a_replayed_forward_keeps_is_not_overwritten_before_its_backward(log):
    path, plain = graphed(), graphed(capture=None)
    plain.captures_left = 0
    for _ in range(2):
        train(path)
        train(plain)
    log.clear()
    losses = [path.loss_sum(*tiny.Rows().rows(step)) for step in (1, 2)]
    validate(path)
    assert log == ["replay"]
    (losses[0] + 2 * losses[1]).backward()
    train(plain, 1)
    (2 * plain.loss_sum(*tiny.Rows().rows(2))).backward()
    torch.testing.assert_close(gradient(path), gradient(plain), rtol=1e-13, atol=1e-15)
    with pytest.raises(RuntimeError, match="one backward"):
        losses[0].backward()


def test_a_loss_that_is_dropped_does_not_stop_the_replays(log):
    path = graphed()
    train(path)
    train(path)
    path.loss_sum(*tiny.Rows().rows(1))
    train(path)
    assert log == ["capture", "replay", "replay", "replay"]


def test_gradients_in_another_place_are_captured_anew(log):
    path = graphed()
    train(path)
    train(path)
    kept = [p.grad for p in path.fused.model.parameters()]
    for p in path.fused.model.parameters():
        p.grad = torch.zeros_like(p)
    train(path, 1)
    assert log == ["capture", "replay", "capture", "replay"]
    assert not torch.equal(gradient(path), torch.cat([g.flatten() for g in kept]))


def test_weights_that_validation_exchanges_leave_the_graph_of_training_alone(log):
    path = graphed()
    train(path)
    train(path)
    validate(path)
    validate(path)
    log.clear()
    weight = path.fused.model.h[0].mlp.c_fc.weight
    own = weight.data
    weight.data = own + 1
    other = validate(path)
    weight.data = own
    assert other != validate(path)
    train(path)
    assert log == ["replay", "replay"]


def test_other_rows_release_the_memory_of_the_former_graphs(log):
    path = graphed()
    train(path)
    train(path)
    first = path.pool
    train(path, rows=slice(0, 4))
    assert path.pool is None
    train(path, rows=slice(0, 4))
    assert log == ["capture", "replay", "capture", "replay"]
    assert path.pool is not first


def test_shapes_that_keep_changing_are_captured_a_bounded_number_of_times(log):
    path = graphed()
    for _ in range(MOST_CAPTURES):
        for rows in (slice(0, 4), slice(0, 4), slice(0, 2), slice(0, 2)):
            train(path, rows=rows)
    assert log.count("capture") == MOST_CAPTURES


def test_what_cannot_be_captured_goes_on_without_and_is_not_tried_again(log):
    def capture(fused, inputs, *rest):
        if len(inputs[0]) == 8:
            try:
                raise RuntimeError("no memory for eight rows")
            finally:
                raise RuntimeError("capture was broken off")
        return Computed(fused, inputs, *rest)

    path, plain = graphed(capture), graphed()
    plain.captures_left = 0
    train(path)
    with pytest.warns(RuntimeWarning, match="no memory for eight rows"):
        train(path)
    train(path)
    for _ in range(3):
        train(path, rows=slice(0, 4))
    assert log == ["capture", "replay", "replay"]
    for rows in [slice(None)] * 3 + [slice(0, 4)] * 3:
        train(plain, rows=rows)
    torch.testing.assert_close(gradient(path), gradient(plain), rtol=1e-13, atol=1e-15)
