"""Copies of tensors on the device and on the host: equal to the originals, and independent of them."""

import pytest
import torch

from regpt.checkpoint.saver import HostMemory, packed_bytes, take_snapshot, views_of

CUDA = torch.device("cuda")


def some_tensors(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(33, 7, generator=generator).to(device),
        "transposed": torch.randn(5, 9, generator=generator).to(device).t(),
        "double": torch.randn(3, generator=generator, dtype=torch.float64).to(device),
        "half": torch.randn(5, generator=generator).to(device, torch.bfloat16),
        "row of padded": torch.randn(9, 4, generator=generator).to(device)[:5],
        "scalar": torch.tensor(2.5, device=device),
    }


def test_views_of_a_buffer_hold_every_shape_and_type_without_overlap():
    tensors = some_tensors("cpu")
    views = views_of(torch.zeros(packed_bytes(tensors), dtype=torch.uint8), tensors)
    for name, tensor in tensors.items():
        views[name].copy_(tensor)
    assert all(views[name].equal(tensor) and views[name].dtype == tensor.dtype for name, tensor in tensors.items())


def check_snapshot(device: str, memory: HostMemory, via: str) -> None:
    tensors = {name: t for name, t in some_tensors(device).items() if t.dtype == torch.float32}
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    snapshot = take_snapshot(tensors, memory)
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert snapshot.via == via
    host = snapshot.on_host()
    assert all(host[name].device.type == "cpu" and host[name].equal(tensor) for name, tensor in expected.items())


def test_a_snapshot_on_the_cpu_does_not_follow_the_originals():
    check_snapshot("cpu", HostMemory(), "host")


@pytest.mark.gpu
def test_a_snapshot_on_a_gpu_does_not_follow_the_originals_and_uses_its_memory_again(monkeypatch):
    memory = HostMemory()
    check_snapshot("cuda", memory, "device")
    assert memory.buffer is not None
    assert memory.buffer.is_pinned()
    first = memory.buffer.data_ptr()
    check_snapshot("cuda", memory, "device")
    assert memory.buffer.data_ptr() == first
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))  # no room for a copy on the device
    check_snapshot("cuda", memory, "host")


@pytest.mark.gpu
def test_a_device_has_its_memory_back_when_the_copy_is_on_the_host():
    tensors = {"a": torch.ones(1 << 20, device=CUDA)}
    before = torch.cuda.memory_allocated()
    snapshot = take_snapshot(tensors, HostMemory())
    assert torch.cuda.memory_allocated() >= before + (4 << 20)
    snapshot.on_host()
    del snapshot
    assert torch.cuda.memory_allocated() <= before + 1024
