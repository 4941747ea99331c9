"""Saved tensors in the host's memory: the same gradients, and what is moved."""

import pytest
import torch
from torch import Tensor

import tiny
from regpt.train import activation_offload
from regpt.train.activation_offload import OnHost
from regpt.train.recompute import recompute_blocks

DEEP = tiny.replace(tiny.CONFIG, n_layer=6)


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch):
    monkeypatch.setattr(activation_offload, "LEAST_BYTES", 1024)


def gradients(device: torch.device, *, offload: bool, recompute: bool, moved: list[Tensor] | None = None):
    model = tiny.build_model(config=DEEP).to(device)
    if recompute:
        recompute_blocks(model)
    hooks = OnHost(list(model.parameters()), device)
    original = hooks.to_host

    def counted(tensor: Tensor):
        packed = original(tensor)
        if moved is not None and packed is not tensor:
            moved.append(tensor)
        return packed

    hooks.pack_hook = counted
    for batch in tiny.Rows(micro_batch_rows=4).step(0):
        batch = batch.to(device)
        hidden = None
        if offload:
            with hooks:
                hidden = model.hidden(batch.idx)
        else:
            hidden = model.hidden(batch.idx)
        hidden.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_bitwise_the_same(recompute: bool):
    moved: list[Tensor] = []
    ours = gradients(tiny.CPU, offload=True, recompute=recompute, moved=moved)
    theirs = gradients(tiny.CPU, offload=False, recompute=recompute)
    assert all(grad.equal(theirs[name]) for name, grad in ours.items())
    state = 4 * tiny.SEQ_LEN * DEEP.n_embd * 8  # bytes of the input of a block
    if recompute:
        blocks = [tensor for tensor in moved if tensor.shape == (4, tiny.SEQ_LEN, DEEP.n_embd)]
        assert len(blocks) >= 2 * 6  # of two micro-batches
        assert sum(tensor.nbytes for tensor in moved) < 2 * 9 * state  # and of the last norm
    else:
        assert sum(tensor.nbytes for tensor in moved) > 2 * 6 * 10 * state


def test_weights_and_small_tensors_stay():
    model = tiny.build_model(config=DEEP)
    hooks = OnHost(list(model.parameters()), tiny.CPU)
    weight = model.get_parameter("h.0.mlp.c_fc.weight")
    for tensor in (weight, weight.t(), torch.zeros(10), torch.zeros(1).expand(1000)):
        assert hooks.to_host(tensor) is tensor
    moved = hooks.to_host(torch.ones(1000))
    assert not isinstance(moved, Tensor)
    assert hooks.to_device(moved).equal(torch.ones(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_on_a_gpu_gradients_are_bitwise_the_same_and_the_tensors_are_not_there(recompute: bool):
    device = torch.device("cuda")
    moved: list[Tensor] = []
    ours = gradients(device, offload=True, recompute=recompute, moved=moved)
    theirs = gradients(device, offload=False, recompute=recompute)
    assert moved
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-12, atol=1e-12)
