"""Time from figures, and from small pieces timed here."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.tools.plan.memory import PlannedStep
from regpt.tools.plan.speed import (
    REACHED,
    SmallStep,
    calibrated_time,
    extrapolate,
    gpu_time,
    sizes,
    stated_time,
    time_pieces,
)
from regpt.train.config import OptimConfig
from regpt.train.devices import device_by_name

PLAIN = PlannedStep(ModelConfig(), 1024, "compiled", "bf16")
GPT2 = PLAIN.shape
H100 = device_by_name("h100")


def test_products_take_their_flops_over_the_rate_that_they_reach():
    parts = gpu_time(PLAIN, 64, 8, 1, H100).parts
    flops = 6 * (12 * 12 * 768**2 + 50304 * 768) * 524_288
    assert parts["products"] == pytest.approx(flops / (989.4e12 * REACHED["compiled"].products))


def test_a_larger_model_comes_closer_to_the_peak():
    mfu = []
    for layers, width in ((12, 768), (24, 1024), (48, 1600)):
        step = replace(PLAIN, model=ModelConfig(n_layer=layers, n_head=width // 64, n_embd=width))
        seconds = gpu_time(step, 8, 1, 1, H100).micro_batch
        mfu.append(step.shape.flops_per_token * 8 * 1024 / seconds / H100.peak_flops)
    assert mfu == sorted(mfu)
    assert all(0.2 < share < 0.7 for share in mfu)


def test_several_gpus_share_the_micro_batches_and_add_a_sum():
    one, eight = gpu_time(PLAIN, 64, 8, 1, H100), gpu_time(PLAIN, 64, 1, 8, H100)
    assert eight.parts["products"] == one.parts["products"] / 8
    assert eight.parts["sum over GPUs"] == pytest.approx(2 * 7 / 8 * 4 * GPT2.padded / (450e9 * 0.6))
    assert "sum over GPUs" not in one.parts


def test_a_slower_card_is_slower_in_what_it_is_slower_at():
    a100 = gpu_time(PLAIN, 64, 8, 1, device_by_name("a100")).parts
    h100 = gpu_time(PLAIN, 64, 8, 1, H100).parts
    assert a100["products"] / h100["products"] == pytest.approx(989.4 / 312)
    assert a100["logits"] / h100["logits"] == pytest.approx(3350 / 2039)


def test_a_tiny_model_waits_for_launches():
    small = PlannedStep(ModelConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=2048), 128, "eager", "fp32")
    time = gpu_time(small, 8, 1, 1, H100)
    assert time.parts["waiting for launches"] > 0.5 * time.micro_batch
    assert gpu_time(PLAIN, 64, 1, 1, H100).parts["waiting for launches"] == 0


def test_a_format_without_units_is_reckoned_as_float32():
    v100 = device_by_name("v100")
    parts = gpu_time(PLAIN, 8, 1, 1, v100).parts
    flops = GPT2.product_flops * 8 * 1024
    assert parts["products"] == pytest.approx(flops / (15.7e12 * REACHED["compiled"].products))


def test_fp8_has_another_rate_for_the_products_of_the_blocks_and_pays_for_casts():
    bf16, fp8 = (gpu_time(replace(PLAIN, precision=name), 64, 8, 1, H100) for name in ("bf16", "fp8"))
    flops = GPT2.block_flops * 524_288
    assert GPT2.block_flops == 6 * 12 * 12 * 768**2
    less = flops / (989.4e12 * REACHED["compiled"].products) - flops / (1979e12 * REACHED["compiled"].fp8_products)
    assert fp8.parts["products"] == pytest.approx(bf16.parts["products"] - less, rel=1e-3)
    assert fp8.parts["casts to FP8"] == pytest.approx(137 * 768 * 12 * 524_288 / 3350e9)
    assert "casts to FP8" not in bf16.parts
    a100 = device_by_name("a100")
    assert gpu_time(replace(PLAIN, precision="fp8"), 64, 8, 1, a100).parts == gpu_time(PLAIN, 64, 8, 1, a100).parts


def test_float64_has_no_time():
    with pytest.raises(UsageError, match="fp64"):
        gpu_time(replace(PLAIN, precision="fp64"), 8, 1, 1, H100)


def test_a_stated_mfu_is_what_comes_out():
    time = stated_time(0.4, flops=1e15, micro_batches=4, peak=989.4e12)
    assert 1e15 / time.seconds / 989.4e12 == pytest.approx(0.4)
    assert time.micro_batch == time.seconds / 4


# ---- calibration ----------------------------------------------------------------------------------------------------

SMALL = PlannedStep(tiny.CONFIG, 12, "eager", "fp32")


def test_a_line_through_two_sizes_predicts_a_third():
    assert extrapolate([1, 3], [3.0, 7.0], 12) == pytest.approx(1 + 2 * 12)


def test_noise_never_makes_more_layers_cheaper():
    assert extrapolate([1, 3], [3.0, 2.0], 48) == 2.0


def test_one_layer_is_timed_as_it_is():
    assert extrapolate([1], [3.0], 1) == 3.0


def test_what_is_timed_is_small_enough():
    large = replace(PLAIN, path="eager", precision="fp32")
    assert sizes(SMALL, 8, peak=1e12) == (8, 12)
    rows, length = sizes(large, 64, peak=1e11)
    assert rows == 1
    assert 1 <= length < 1024
    assert sizes(large, 64, peak=1e3) == (1, 1)


def test_a_small_step_does_what_a_training_step_does():
    small = SmallStep(SMALL, OptimConfig(lr=0.1), 2, 12, tiny.CPU)
    before = [p.detach().clone() for p in small.model.parameters()]
    small.micro_batch()
    assert all(p.grad is not None for p in small.model.parameters())
    small.update()
    assert all(not torch.equal(p, was) for p, was in zip(small.model.parameters(), before) if p.dim() > 1)


def test_times_are_medians_of_each_model_after_the_first(monkeypatch):
    durations = iter([99.0] * 4 + [5.0, 0.1, 9.0, 0.2] + [3.0, 0.1, 8.0, 0.2] * 2 + [4.0, 0.3, 7.0, 0.2] * 2)
    monkeypatch.setattr("regpt.tools.plan.speed.seconds", lambda function, device: next(durations))
    steps = [replace(SMALL, model=replace(tiny.CONFIG, n_layer=n)) for n in (1, 2)]
    assert time_pieces([SmallStep(one, OptimConfig(), 1, 4, tiny.CPU) for one in steps]) == [(4.0, 0.1), (8.0, 0.2)]


def test_time_grows_with_rows_and_micro_batches(monkeypatch):
    monkeypatch.setattr("regpt.tools.plan.speed.time_pieces", lambda steps: [(1.0, 0.5), (1.5, 0.7)])
    monkeypatch.setattr("regpt.tools.plan.speed.sizes", lambda *args: (2, 12))
    time = calibrated_time(SMALL, OptimConfig(), rows=8, micro_batches=3, device=tiny.CPU, peak=1e11)
    assert time.micro_batch == pytest.approx(1.5 * 4)
    assert time.seconds == pytest.approx(1.5 * 4 * 3 + 0.7)
    assert math.isclose(sum(time.parts.values()), time.seconds)
    assert "2 × 12 tokens" in time.how
