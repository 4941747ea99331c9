"""FLOPs a token against torch's own count of a forward and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from regpt.model.config import ModelConfig
from regpt.train.metrics import PEAK_FLOPS, flops_per_token, peak_flops, peak_memory_gib


def test_flops_are_those_that_torch_counts():
    B, T = 2, 16
    model = tiny.build_model(pad_vocab=False, dtype=torch.float32)
    idx = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whole products, as we count them
        model(idx).sum().backward()
    assert flops_per_token(tiny.CONFIG, T) * B * T == counter.get_total_flops()


def test_flops_of_gpt2_124m():
    # 6 × 123,532,032 weights of matrix products (84,934,656 in the blocks, 38,597,376 in the head), 12·12·768·1024
    assert flops_per_token(ModelConfig(), 1024) == 6 * 123_532_032 + 113_246_208


def test_the_cpu_has_no_data_sheet():
    assert peak_flops(tiny.CPU) is None
    assert peak_memory_gib(tiny.CPU) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_found_by_the_devices_name(monkeypatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert list(PEAK_FLOPS).index("H100 PCIe") < list(PEAK_FLOPS).index("H100")
