"""Weights at initialisation, and their way into a model and out of it."""

import math

import pytest
import torch

import tiny
from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, initialize, load_weights, state_tensors

WIDE = ModelConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=1000, max_seq_len=64)


def fresh(config: ModelConfig = tiny.CONFIG, seed: int = 7, **options) -> Transformer:
    return initialize(make_model(config, **options), seed)


def assert_same(given: Transformer, expected: Transformer) -> None:
    theirs = state_tensors(expected)
    assert state_tensors(given).keys() == theirs.keys()
    assert all(tensor.cpu().equal(theirs[name].cpu()) for name, tensor in state_tensors(given).items())


def test_initial_weights_have_gpt2s_spread_and_residual_projections_less():
    for name, weight in state_tensors(fresh(WIDE)).items():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            few = 4 / math.sqrt(weight.numel())  # four standard errors
            assert weight.std().item() == pytest.approx(std, rel=few / math.sqrt(2)), name
            assert abs(weight.mean().item()) < few * std, name
            # A normal distribution and not another of the same spread: its fourth moment is 3 (standard error √(96/n)).
            assert ((weight / std) ** 4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / weight.numel())), name


def test_no_two_parameters_start_with_the_same_numbers():
    weights = [w.flatten()[:16] for name, w in state_tensors(fresh(WIDE)).items() if w.dim() == 2]
    firsts = {tuple((w / w.norm()).tolist()) for w in weights}
    assert len(firsts) == len(weights)


def test_the_seed_decides():
    assert not fresh(seed=7).wte.weight.equal(fresh(seed=8).wte.weight)
    assert_same(fresh(seed=7), fresh(seed=7))


def test_initial_weights_do_not_depend_on_padding_or_what_the_process_did_before():
    expected = fresh()
    assert_same(fresh(pad_vocab=False), expected)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    try:
        assert_same(fresh(), expected)
    finally:
        torch.set_rng_state(state)


def test_initial_weights_do_not_touch_the_global_random_state():
    model = make_model(tiny.CONFIG)
    before = torch.get_rng_state()
    initialize(model, 1)
    assert torch.get_rng_state().equal(before)


def test_initial_weights_do_not_depend_on_the_default_dtype_or_device():
    expected, model, on_meta = fresh(), make_model(tiny.CONFIG), make_model(tiny.CONFIG)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(initialize(model, 7), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_same(initialize(on_meta, 7), expected)


def test_a_float64_model_starts_from_the_same_float32_numbers():
    double = initialize(make_model(tiny.CONFIG).double(), 7)
    assert double.wte.weight.dtype == torch.float64
    assert double.wte.weight.float().equal(fresh().wte.weight)


def test_padding_rows_are_zero_also_in_memory_that_held_something_else():
    with torch.device("meta"):
        model = make_model(tiny.CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    assert_same(initialize(model, 7), fresh())
    assert (model.wte.weight[97:] == 0).all()
    assert len(model.wte.weight) == 128


def test_weights_out_and_in_again_are_the_same():
    model = fresh()
    assert_same(load_weights(make_model(tiny.CONFIG, pad_vocab=False), state_tensors(model)), model)
    assert state_tensors(model)["wte.weight"].data_ptr() == model.wte.weight.data_ptr()  # views: no copy


def test_weights_that_do_not_fit_are_refused_by_name():
    weights = state_tensors(fresh())
    lacking = {name: w for name, w in weights.items() if name != "ln_f.bias"}
    cases = [
        (lacking, r"^the weights lack 'ln_f\.bias': 1 missing, 0 unknown for this model's shape$"),
        (weights | {"lm_head.weight": torch.zeros(1)}, r"have the unknown tensor 'lm_head\.weight': 0 missing, 1 unk"),
        (weights | {"wte.weight": torch.zeros(128, 24)}, r"'wte\.weight' has shape \(128, 24\).* needs \(97, 24\)"),
        (weights | {"ln_f.bias": torch.zeros(24, dtype=torch.int8)}, r"'ln_f\.bias' has .*type torch\.int8"),
    ]
    for given, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            load_weights(make_model(tiny.CONFIG), given)


def test_parameters_are_counted_without_padding_and_the_tied_head_once():
    C, V, T, L = 24, 97, 16, 2
    block = 4 * C + (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    expected = V * C + T * C + L * block + 2 * C
    assert count_parameters(fresh()) == expected
    assert count_parameters(fresh(pad_vocab=False)) == expected
