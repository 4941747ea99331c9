"""The shape of a model: what is refused, and in which words."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from regpt.errors import UsageError
from regpt.model.config import FAMILIES, ModelConfig
from regpt.model.weights import state_tensors
from tiny import build_model


def test_the_default_is_gpt2_124m():
    assert ModelConfig() == ModelConfig("gpt2", n_layer=12, n_head=12, n_embd=768, vocab_size=50257, max_seq_len=1024)


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -3])
def test_every_size_must_be_positive(name: str, value: int):
    with pytest.raises(UsageError, match=rf"^model\.{name} is {value}, must be at least 1$"):
        replace(ModelConfig(), **{name: value})


def test_only_the_vocabulary_may_be_left_to_the_data():
    assert ModelConfig(vocab_size=0).vocab_size == 0
    with pytest.raises(UsageError, match=r"^model\.vocab_size is -3, must be at least 1, or 0 for the vocabulary"):
        ModelConfig(vocab_size=-3)


@pytest.mark.parametrize(
    ("n_embd", "n_head", "near"), [(768, 10, "6, 8, 12"), (7, 2, "1, 7"), (1, 2, "1"), (770, 12, "10, 11, 14")]
)
def test_a_width_that_the_heads_do_not_divide_is_refused_with_heads_that_do(n_embd: int, n_head: int, near: str):
    sentence = f"model.n_embd = {n_embd} is not divisible by model.n_head = {n_head}; n_head = {near} would fit"
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}$"):
        ModelConfig(n_embd=n_embd, n_head=n_head)
    for fits in near.split(", "):
        ModelConfig(n_embd=n_embd, n_head=int(fits))


CHANGES: list[dict[str, Any]] = [
    {"n_kv_head": 2},
    {"head_size": 6},
    {"n_inner": 21},
    {"n_expert": 3},
    {"n_expert": 3, "n_expert_active": 3},
    {"n_expert_shared": 1},
    {"norm_topk": False},
    {"expert_bias": True},
    {"activation": "relu"},
    *({"bias": bias} for bias in ("all", "attention", "qkv", "mlp", "none")),
    {"norm_eps": 1e-2},
    {"tie_embeddings": False},
    {"attention_scale_by_layer": True},
    {"rope_theta": 50.0},
    {"rope_fraction": 0.5},
    {"rope_factor": 4.0},
    {"rope_low_freq_factor": 2.0},
    {"rope_high_freq_factor": 3.0},
    {"rope_original_max_seq_len": 8},
    {"rope_type": "linear", "rope_factor": 4.0},
    {"rope_type": "linear", "rope_factor": 4.0, "rope_original_max_seq_len": 8},
    {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_max_seq_len": 8},
    {"no_rope_every": 2},
    {"window": 3},
    {"full_attention_every": 1},
    {"rope_local_theta": 50.0},
    {"query_pre_attn_scalar": 3},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_with_each_field_or_refuses_it(family: Any):
    """A field that changed neither a parameter nor a logit would be ignored in silence."""
    plain = ModelConfig(family, n_layer=2, n_head=4, n_embd=32, vocab_size=97, max_seq_len=16, n_inner=24)
    if FAMILIES[family].layered:
        plain = replace(plain, window=4, full_attention_every=2)
    before, idx = build_model(config=plain), torch.arange(12)[None]
    refused: list[str] = []
    for change in CHANGES:
        if all(getattr(plain.resolved(), name) == value for name, value in change.items()):
            continue
        try:
            config = replace(plain, **change)
        except UsageError as error:
            refused.append(str(error))
            continue
        after = build_model(config=config)
        names = {name: tensor.shape for name, tensor in state_tensors(after).items()}
        changed = names != {name: tensor.shape for name, tensor in state_tensors(before).items()}
        assert after(idx).shape == (1, 12, 97)
        assert changed or not torch.equal(after(idx), before(idx)), f"{change} changes nothing"
    assert 0 < len(refused) < len(CHANGES)
    assert all(re.search(r"leave it out or|choose ", sentence) for sentence in refused)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"family": "gpt2", "n_kv_head": 2}, "n_kv_head is 2, but gpt2 has a key for each query; .* reads it: llama, "),
        ({"family": "gpt2", "head_size": 6}, "head_size is 6, but heads of gpt2 are n_embd / n_head wide; "),
        ({"family": "gpt2", "rope_theta": 2.0}, "rope_theta is 2.0, but gpt2 has learned positions; "),
        (
            {"attention_scale_by_layer": True},
            "by_layer is True, but llama does not scale attention by layer; .*: gpt2$",
        ),
        (
            {"rope_factor": 2.0},
            "2.0, which model.rope_type default does not read; .* model.rope_type to linear or llama3$",
        ),
        (
            {"rope_type": "linear", "rope_low_freq_factor": 2.0},
            "rope_type linear does not read; .* model.rope_type to llama3$",
        ),
    ],
)
def test_a_field_that_is_not_read_is_refused_with_those_who_read_it(change: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=f"^model.*{sentence}"):
        ModelConfig(**{"family": "llama", **change})


def test_a_field_may_state_what_it_stands_for_anyhow():
    assert ModelConfig(n_kv_head=12, head_size=64).resolved() == ModelConfig().resolved()
