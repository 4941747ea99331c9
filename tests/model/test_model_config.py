"""The shape of a model: what is refused, and in which words."""

import re
from dataclasses import replace

import pytest

from regpt.errors import UsageError
from regpt.model.config import ModelConfig


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
