"""Copies of tensors on the host: equal to the originals, and independent of them."""

import pytest
import torch

from regpt.checkpoint.saver import copied_to_host


def some_tensors(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(33, 7, generator=generator).to(device),
        "transposed": torch.randn(5, 9, generator=generator).to(device).t(),
        "double": torch.randn(3, generator=generator, dtype=torch.float64).to(device),
        "half": torch.randn(5, generator=generator).to(device, torch.bfloat16),
        "row of padded": torch.randn(9, 4, generator=generator).to(device)[:5],
        "scalar": torch.tensor(2.5, device=device),
        "offloaded": torch.randn(4, generator=generator),
    }


def check_copies(device: str, pinned: dict[str, torch.Tensor]) -> None:
    tensors = some_tensors(device)
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    copies = copied_to_host(tensors, pinned)
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert copies.keys() == expected.keys()
    for name, tensor in expected.items():
        assert copies[name].device.type == "cpu"
        assert copies[name].dtype == tensor.dtype
        assert copies[name].equal(tensor)


def test_copies_on_the_cpu_do_not_follow_the_originals():
    check_copies("cpu", {})


@pytest.mark.gpu
def test_copies_of_a_gpus_tensors_do_not_follow_the_originals_and_use_their_memory_again():
    pinned: dict[str, torch.Tensor] = {}
    check_copies("cuda", pinned)
    assert pinned
    assert all(buffer.is_pinned() for buffer in pinned.values())
    first = {name: buffer.data_ptr() for name, buffer in pinned.items()}
    check_copies("cuda", pinned)
    assert {name: buffer.data_ptr() for name, buffer in pinned.items()} == first
