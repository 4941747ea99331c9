"""The draw by two kernels against the plain one: on a GPU, or on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_sampler.py`, with numpy below 2.4).
"""

import math
import os

import pytest
import torch

from regpt.engine.decode import POSITION, TABLE, TOKEN, row_state
from regpt.engine.processing import SamplingOptions, draw, rows_of

triton = pytest.importorskip("triton")
sampler = pytest.importorskip("regpt.kernels.sampler")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(0.7, 5),
    SamplingOptions(temperature=0),
    SamplingOptions(1.3, 60, 0.8),
    SamplingOptions(1.0, 1),
    SamplingOptions(2.0, 40, min_p=0.02),
    SamplingOptions(1e-320, 50),
]


@pytest.mark.parametrize("n_vocab", [97, 2048, 5000])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_kernels_draw_what_the_reference_draws(n_vocab, rounded):
    B = 3 * len(OPTIONS)
    logits = torch.randn(B, n_vocab + 31, generator=torch.Generator().manual_seed(n_vocab)) * 3 - 50
    logits = logits.bfloat16().float() if rounded else logits  # with many equals
    options, seeds = OPTIONS * 3, [i * 2**33 + 7 for i in range(B)]
    positions = torch.arange(B) * 37
    state = torch.stack([row_state(int(p), s, o, [5], TABLE + 2) for p, s, o in zip(positions, seeds, options)])
    expected = draw(logits[:, :n_vocab], rows_of(options, seeds, n_vocab), positions + 1)
    state = state.to(DEVICE)
    found = sampler.draw_into(logits.to(DEVICE), state, n_vocab).cpu()
    assert found[:, 0].long().tolist() == expected.tokens.tolist()
    assert torch.allclose(found[:, 1].float(), expected.logprobs, atol=2e-5)
    assert found[:, 2:].min() == 1
    assert state[:, TOKEN].tolist() == expected.tokens.tolist()
    assert state[:, POSITION].tolist() == (positions + 1).tolist()
    assert state[:, TABLE].tolist() == [5] * B


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_reported_for_their_row(value):
    logits = torch.randn(3, 97)
    logits[1, 5] = value
    state = torch.stack([row_state(0, 1, OPTIONS[0], [], TABLE + 1)] * 3).to(DEVICE)
    found = sampler.draw_into(logits.to(DEVICE), state, 97)
    assert found[:, 2].tolist() == [1, 0, 1]
    assert 0 <= int(state[1, TOKEN]) < 97
