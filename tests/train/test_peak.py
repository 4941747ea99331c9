"""What MFU is a share of: a data sheet, or a measurement that is made once and says so."""

import pytest
import torch

import tiny
from regpt.train import peak as peak_module
from regpt.train.peak import device_peak, matmul_flops


@pytest.fixture(autouse=True)
def forget():
    device_peak.cache_clear()
    yield
    device_peak.cache_clear()


@pytest.mark.parametrize(
    ("name", "flops", "precision"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, "bf16"),
        ("NVIDIA H100 PCIe", 756e12, "bf16"),
        ("NVIDIA A100-SXM4-80GB", 312e12, "bf16"),
        ("Tesla T4", 65e12, "fp16"),
        ("Tesla V100-SXM2-16GB", 125e12, "fp16"),
    ],
)
def test_a_known_gpu_has_its_data_sheet_s_peak(monkeypatch, name: str, flops: float, precision: str):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak(torch.device("cuda"), "bf16")
    assert peak.flops == flops
    assert not peak.how.startswith("measured")
    assert "data sheet" in str(peak)
    assert f"dense {precision}" in str(peak)


def test_a_run_in_fp8_is_held_against_the_peak_of_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak = device_peak(torch.device("cuda"), "fp8")
    assert (peak.flops, peak.how) == (1978.9e12, "data sheet of the H100 SXM, dense fp8")


def test_an_unknown_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 9990")
    monkeypatch.setattr(peak_module, "matmul_flops", lambda device, precision, n: 5e12)
    peak = device_peak(torch.device("cuda"), "bf16")
    assert peak.flops == 5e12
    assert peak.how.startswith("measured here")
    assert "measured here: a bf16 product of 4096 × 4096 matrices on cuda" in peak.how


def test_the_cpu_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(peak_module, "matmul_flops", lambda *args: calls.append(args) or 1e11)
    first = device_peak(tiny.CPU, "fp32")
    assert first.how.startswith("measured here")
    assert "1 thread" in first.how
    assert device_peak(tiny.CPU, "fp32") is first
    assert len(calls) == 1


def test_the_rate_is_operations_over_the_shortest_time(monkeypatch):
    times = iter([0, 0, 2, 2, 3, 3, 7, 9])  # started; begin and end of three products; a look at the budget
    monkeypatch.setattr(peak_module.time, "perf_counter", lambda: next(times))
    assert matmul_flops(tiny.CPU, "fp32", 8, seconds=5) == 2 * 8**3 / 1


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp8", "fp64"])
def test_measuring_leaves_no_trace(precision: str):
    torch.set_float32_matmul_precision("highest")  # another test may have left another
    before = torch.get_rng_state()
    assert matmul_flops(tiny.CPU, precision, 16, seconds=0) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_float32_matmul_precision() == "highest"
