"""Time from figures, and from small pieces timed here."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.tools.plan.calibrate import Case, Piece, calibrated_speed, extrapolate, sizes, time_pieces
from regpt.tools.plan.coefficients import COMPILED_FP8, COMPILED_HALF
from regpt.tools.plan.memory import Settings, gpu_memory
from regpt.tools.plan.shape import shape_of
from regpt.tools.plan.speed import gpu_speed, speed_at
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.devices import device_by_name

GPT2 = shape_of(ModelConfig(), 1024, pad_vocab=True)
H100 = device_by_name("h100")
PLAIN = Settings("compiled", "bf16")


def test_the_measured_step_on_an_h100():
    """1,084.7 ms: gpt2-124m, 8 micro-batches of 64 rows of 1024, torch.compile, bfloat16 (docs/log.md)."""
    assert gpu_speed(GPT2, 64, 8, 1, H100, PLAIN).seconds == pytest.approx(1.0847, rel=0.01)


MEASURED = [  # docs/log.md, "The fused path": layers, heads, width, T, rows, micro-batches, ms a step, GiB
    (12, 12, 768, 1024, 64, 8, 891.2, 26.83),
    (12, 12, 768, 1024, 128, 4, 878.2, 51.39),
    (12, 12, 768, 2048, 32, 8, 974.1, 26.85),
    (24, 16, 1024, 1024, 32, 16, 2506.9, 33.52),
    (48, 25, 1600, 1024, 8, 16, 2606.7, 47.02),
]


@pytest.mark.parametrize(("layers", "heads", "width", "T", "rows", "micro_batches", "ms", "gib"), MEASURED)
def test_the_measured_steps_of_the_fused_path(layers, heads, width, T, rows, micro_batches, ms, gib):
    shape = shape_of(ModelConfig(n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T), T, pad_vocab=True)
    speed = gpu_speed(shape, rows, micro_batches, 1, H100, Settings("fused", "bf16"))
    assert speed.seconds == pytest.approx(ms / 1e3, rel=0.05)
    assert gpu_memory(shape, rows, Settings("fused", "bf16")).peak / 2**30 == pytest.approx(gib, rel=0.03)


def test_products_take_their_flops_over_the_rate_that_they_reach():
    parts = gpu_speed(GPT2, 64, 8, 1, H100, PLAIN).parts
    flops = 6 * (12 * 12 * 768**2 + 50304 * 768) * 524_288
    assert parts["products"] == pytest.approx(flops / (989.4e12 * COMPILED_HALF.product_share))


def test_a_larger_model_comes_closer_to_the_peak():
    mfu = []
    for layers, width in ((12, 768), (24, 1024), (48, 1600)):
        shape = shape_of(ModelConfig(n_layer=layers, n_head=width // 64, n_embd=width), 1024, pad_vocab=True)
        seconds = gpu_speed(shape, 8, 1, 1, H100, PLAIN).micro_batch
        mfu.append(shape.flops_per_token * 8 * 1024 / seconds / H100.peak_flops)
    assert mfu == sorted(mfu)
    assert all(0.2 < share < 0.7 for share in mfu)


def test_several_gpus_share_the_micro_batches_and_add_a_sum():
    one, eight = gpu_speed(GPT2, 64, 8, 1, H100, PLAIN), gpu_speed(GPT2, 64, 1, 8, H100, PLAIN)
    assert eight.parts["products"] == one.parts["products"] / 8
    assert eight.parts["sum over GPUs"] == pytest.approx(2 * 7 / 8 * 4 * GPT2.padded / (450e9 * 0.6))
    assert "sum over GPUs" not in one.parts


def test_a_slower_card_is_slower_in_what_it_is_slower_at():
    a100 = gpu_speed(GPT2, 64, 8, 1, device_by_name("a100"), PLAIN).parts
    h100 = gpu_speed(GPT2, 64, 8, 1, H100, PLAIN).parts
    assert a100["products"] / h100["products"] == pytest.approx(989.4 / 312)
    assert a100["logits"] / h100["logits"] == pytest.approx(3350 / 2039)


def test_a_tiny_model_waits_for_launches():
    shape = shape_of(ModelConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=2048), 128, pad_vocab=True)
    speed = gpu_speed(shape, 8, 1, 1, H100, Settings("eager", "fp32"))
    assert speed.parts["waiting for launches"] > 0.5 * speed.micro_batch
    assert gpu_speed(GPT2, 64, 1, 1, H100, PLAIN).parts["waiting for launches"] == 0


def test_a_format_without_units_is_reckoned_as_float32():
    v100 = device_by_name("v100")
    parts = gpu_speed(GPT2, 8, 1, 1, v100, PLAIN).parts
    flops = GPT2.product_flops * 8 * 1024
    assert parts["products"] == pytest.approx(flops / (15.7e12 * COMPILED_HALF.product_share))


MEASURED_FP8 = [  # docs/log.md, "FP8 on the fused path": path, layers, heads, width, rows, micro-batches, ms, GiB
    ("compiled", 12, 12, 768, 64, 8, 1120.0, 22.03),
    ("compiled", 8, 25, 1600, 16, 8, 526.6, 11.74),
    ("fused", 12, 12, 768, 64, 8, 799.7, 24.28),
    ("fused", 12, 12, 768, 128, 4, 789.8, 46.03),
    ("fused", 24, 16, 1024, 32, 4, 511.6, 30.42),
    ("fused", 48, 25, 1600, 8, 16, 2028.1, 46.83),
]


@pytest.mark.parametrize(("path", "layers", "heads", "width", "rows", "micro_batches", "ms", "gib"), MEASURED_FP8)
def test_the_measured_steps_in_fp8(path, layers, heads, width, rows, micro_batches, ms, gib):
    shape = shape_of(ModelConfig(n_layer=layers, n_head=heads, n_embd=width), 1024, pad_vocab=True)
    speed = gpu_speed(shape, rows, micro_batches, 1, H100, Settings(path, "fp8"))
    assert speed.seconds == pytest.approx(ms / 1e3, rel=0.015)
    assert gpu_memory(shape, rows, Settings(path, "fp8")).peak / 2**30 == pytest.approx(gib, rel=0.03)


def test_fp8_has_another_rate_for_the_products_of_the_blocks_and_pays_for_casts():
    bf16, fp8 = (gpu_speed(GPT2, 64, 8, 1, H100, Settings("compiled", name)) for name in ("bf16", "fp8"))
    flops = GPT2.block_flops * 524_288
    assert GPT2.block_flops == 6 * 12 * 12 * 768**2
    less = flops / (989.4e12 * COMPILED_HALF.product_share) - flops / (1979e12 * COMPILED_FP8.fp8_share)
    assert fp8.parts["products"] == pytest.approx(bf16.parts["products"] - less, rel=1e-3)
    assert fp8.parts["casts to FP8"] == pytest.approx(137 * 768 * 12 * 524_288 / 3350e9)
    assert "casts to FP8" not in bf16.parts
    assert gpu_speed(GPT2, 64, 8, 1, device_by_name("a100"), Settings("compiled", "fp8")).parts == (
        gpu_speed(GPT2, 64, 8, 1, device_by_name("a100"), PLAIN).parts
    )


def test_combinations_without_numbers_are_refused():
    with pytest.raises(UsageError, match="fused path does not compute in fp32"):
        gpu_speed(GPT2, 8, 1, 1, H100, Settings("fused", "fp32"))
    with pytest.raises(UsageError, match="fp64"):
        gpu_speed(GPT2, 8, 1, 1, H100, Settings("eager", "fp64"))


def test_a_stated_mfu_is_what_comes_out():
    speed = speed_at(0.4, flops=1e15, micro_batches=4, peak=989.4e12)
    assert 1e15 / speed.seconds / 989.4e12 == pytest.approx(0.4)
    assert speed.micro_batch == speed.seconds / 4


# ---- calibration ----------------------------------------------------------------------------------------------------

TRAIN = TrainConfig(precision="fp32", compile=False, batch_tokens=64, micro_batch_rows=2)


def test_a_line_through_two_sizes_predicts_a_third():
    pieces = [Piece(1, micro_batch=3.0, update=0.5), Piece(3, micro_batch=7.0, update=0.7)]
    assert extrapolate(pieces, 12, lambda piece: piece.micro_batch) == pytest.approx(1 + 2 * 12)
    assert extrapolate(pieces, 12, lambda piece: piece.update) == pytest.approx(0.4 + 0.1 * 12)


def test_noise_never_makes_more_layers_cheaper():
    pieces = [Piece(1, 3.0, 0.5), Piece(3, 2.0, 0.5)]
    assert extrapolate(pieces, 48, lambda piece: piece.micro_batch) == 2.0


def test_one_layer_is_timed_as_it_is():
    assert extrapolate([Piece(1, 3.0, 0.5)], 1, lambda piece: piece.micro_batch) == 3.0


def test_what_is_timed_is_small_enough():
    small, large = tiny.CONFIG, ModelConfig()
    assert sizes(small, TRAIN, 12, 8, peak=1e12) == (8, 12)
    rows, length = sizes(large, TRAIN, 1024, 64, peak=1e11)
    assert rows == 1
    assert 1 <= length < 1024
    assert sizes(large, TRAIN, 1024, 64, peak=1e3) == (1, 1)


def test_a_case_does_what_a_training_step_does():
    case = Case(tiny.CONFIG, TRAIN, OptimConfig(lr=0.1), 2, 12, tiny.CPU)
    before = [p.detach().clone() for p in case.model.parameters()]
    case.micro_batch()
    assert all(p.grad is not None for p in case.model.parameters())
    case.update()
    assert all(not torch.equal(p, was) for p, was in zip(case.model.parameters(), before) if p.dim() > 1)


def test_pieces_are_medians_of_each_model(monkeypatch):
    durations = iter([5.0, 0.1, 9.0, 0.2] + [3.0, 0.1, 8.0, 0.2] * 2 + [4.0, 0.3, 7.0, 0.2] * 2)
    monkeypatch.setattr("regpt.tools.plan.calibrate.seconds", lambda function, device: next(durations))
    cases = [Case(replace(tiny.CONFIG, n_layer=n), TRAIN, OptimConfig(), 1, 4, tiny.CPU) for n in (1, 2)]
    assert time_pieces(cases) == [Piece(1, 4.0, 0.1), Piece(2, 8.0, 0.2)]


def test_time_grows_with_rows_and_micro_batches(monkeypatch):
    pieces = [Piece(1, 1.0, 0.5), Piece(2, 1.5, 0.7)]
    monkeypatch.setattr("regpt.tools.plan.calibrate.time_pieces", lambda cases: pieces)
    monkeypatch.setattr("regpt.tools.plan.calibrate.sizes", lambda *args: (2, 12))
    given = {"seq_len": 12, "device": tiny.CPU, "peak": 1e11}
    speed = calibrated_speed(tiny.CONFIG, TRAIN, OptimConfig(), rows=8, micro_batches=3, **given)
    assert speed.micro_batch == pytest.approx(1.5 * 4)
    assert speed.seconds == pytest.approx(1.5 * 4 * 3 + 0.7)
    assert math.isclose(sum(speed.parts.values()), speed.seconds)
    assert "2 × 12 tokens" in speed.how
