"""FLOPs a token against torch's own count of a forward and backward pass; peak memory."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import without_memory
from regpt.train.memory import peak_memory_gib
from regpt.train.peak import flops_per_token


def test_flops_are_those_that_torch_counts():
    B, T = 2, 16
    model = tiny.build_model(pad_vocab=False, dtype=torch.float32)
    idx = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whole products, as we count them
        model(idx).sum().backward()
    assert flops_per_token(model, T) * B * T == counter.get_total_flops()


def test_flops_of_gpt2_124m():
    # 6 × 123,532,032 weights of matrix products (84,934,656 in the blocks, 38,597,376 in the head), 12·12·768·1024
    with without_memory():
        model = make_model(ModelConfig())
    assert flops_per_token(model, 1024) == 6 * 123_532_032 + 113_246_208


def test_memory_on_the_cpu_is_that_of_the_process():
    before = peak_memory_gib(tiny.CPU)
    assert before is not None
    assert 0.05 < before < 64
    held = torch.ones(2**28)  # 1 GiB
    after = peak_memory_gib(tiny.CPU)
    assert after is not None
    assert after >= before
    assert after >= 1.05
    del held
    assert peak_memory_gib(tiny.CPU) == pytest.approx(after, abs=0.01)  # the most, not the present


def test_memory_that_nothing_counts_is_none():
    assert peak_memory_gib(torch.device("mps")) is None
