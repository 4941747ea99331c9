"""The table of data sheets: consistent in itself, found by what drivers and users say, and not found by mistake."""

import dataclasses
from pathlib import Path

import pytest

from regpt.errors import UsageError
from regpt.train.devices import DEVICES, device_by_driver, device_by_name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M1", "Apple M1"),
        ("Apple M1 Max", "Apple M1 Max"),
    ],
)
def test_a_driver_s_name_finds_its_device(driver: str, name: str):
    device = device_by_driver(driver)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize(
    "driver",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 3060",
        "Quadro RTX 6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA T400",
        "GRID T4-16Q",
        "Apple M2 Max",
        "Apple M4",
        "cpu",
    ],
)
def test_another_product_is_not_taken_for_a_known_one(driver: str):
    assert device_by_driver(driver) is None


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("h100", "H100 SXM"),
        ("H100-PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("a100", "A100 80GB SXM"),
        ("A100-40GB", "A100 40GB"),
        ("rtx4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("3090", "RTX 3090"),
        ("l40s", "L40S"),
        ("m1 max", "Apple M1 Max"),
    ],
)
def test_a_user_may_type_what_comes_to_mind(typed: str, name: str):
    assert device_by_name(typed).name == name


def test_an_unknown_name_is_one_sentence_with_the_nearest():
    with pytest.raises(UsageError, match=r"a GPU called 'h101' \(did you mean 'h100'\?\); give cpu, or one of H100"):
        device_by_name("h101")


def test_names_are_unambiguous():
    typed = [name for device in DEVICES for name in (device.name, *device.also)]
    assert len(set(typed)) == len(typed)
    for name in typed:
        device_by_name(name)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_figures_of_a_device_fit_together(device):
    """Narrower formats are never slower; half the bits, twice the rate."""
    rates = [rate for rate in (device.fp32, device.tf32, device.bf16, device.fp8) if rate]
    assert rates == sorted(rates)
    if device.bf16:
        assert device.fp16 == device.bf16
    if device.bf16 and device.tf32:
        assert device.bf16 / device.tf32 == pytest.approx(2, rel=0.03)
    if device.bf16 and device.fp8:
        assert device.fp8 / device.bf16 == pytest.approx(2, rel=0.03)
    assert device.peak_flops == max(x for x in (device.fp32, device.bf16, device.fp16) if x) * 1e12
    assert 1 < device.memory_gib < 300
    assert 10 < device.bandwidth <= 8000
    assert device.source
    assert all(dataclasses.astuple(device)[:2])


def test_the_h100_is_the_data_sheets():
    h100 = device_by_name("h100")
    assert (h100.bf16, h100.fp8, h100.bandwidth) == (1979 / 2 - 0.1, 3957.8 / 2, 3350)


def test_the_documentation_has_the_same_table():
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for device in DEVICES:
        figures = (device.fp32, device.tf32, device.bf16, device.fp16, device.fp8)
        figures += (device.memory_gib, device.bandwidth, device.link)
        cells = [device.name, *("–" if x is None else f"{x:,g}" for x in figures), device.source]
        assert f"| {' | '.join(cells)} |\n" in page
