"""Attention to pages against the plain one: on a GPU, or on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_paged.py`, with numpy below 2.4).
"""

import os

import pytest
import torch

from regpt.engine.cache import DecodeView, Pages
from regpt.model.config import ModelConfig
from regpt.model.masks import AttentionMask
from regpt.model.ops import attention

triton = pytest.importorskip("triton")
paged = pytest.importorskip("regpt.kernels.paged")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def filled(H: int, G: int, D: int, page: int, dtype: torch.dtype) -> tuple[Pages, torch.Tensor, torch.Tensor]:
    """Pages of noise, tables of three texts in scattered pages, and the positions of their next tokens."""
    source = torch.Generator().manual_seed(H + D)
    config = ModelConfig(n_layer=1, n_head=H, n_kv_head=G, n_embd=H * D, head_size=D, family="llama")
    pages = Pages(config, 3 * 20, page, DEVICE, dtype)
    for held in (pages.k, pages.v):
        held.copy_(torch.randn(held.shape, generator=source))
    tables = 1 + torch.randperm(60, generator=source).view(3, 20)
    positions = torch.tensor([0, page * 7 + 1, page * 20 - 1])
    return pages, tables.to(DEVICE), positions.to(DEVICE)


@pytest.mark.parametrize(("H", "G", "D"), [(2, 2, 8), (4, 2, 64), (3, 1, 20)])
@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize("page", [4, 16])
def test_decode_attention(H, G, D, window, page):
    pages, tables, positions = filled(H, G, D, page, torch.float32)
    q = torch.randn(3, H, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = DecodeView(pages, tables, positions).attend_pages(q, 0, AttentionMask(window=window))
    state = torch.stack((positions, positions), dim=1)  # strided, as in the rows' state
    found = paged.decode_attention(q, pages.k[0], pages.v[0], tables, state[:, 1], page, window)
    assert (found - expected).abs().max() < 2e-6


@pytest.mark.skipif(DEVICE.type != "cuda", reason="FlashAttention is for CUDA")
@pytest.mark.parametrize("window", [None, 7])
def test_prefill_attention(window):
    H, G, D = 4, 2, 64
    source = torch.Generator().manual_seed(1)
    news, totals = [5, 1, 40], [5, 30, 64]
    q = torch.randn(1, H, sum(news), D, generator=source).to(DEVICE, torch.bfloat16)
    k, v = torch.randn(2, 1, G, sum(totals), D, generator=source).to(DEVICE, torch.bfloat16)
    starts = [torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int() for sizes in (news, totals)]
    found = paged.prefill_attention(q, k, v, (starts[0], starts[1]), (40, 64), window)
    for i, (new, total) in enumerate(zip(news, totals)):
        at, to = int(starts[0][i]), int(starts[1][i])
        from regpt.model.masks import sdpa_mask

        seen = sdpa_mask(AttentionMask(window=window), 1, new, total, DEVICE)
        rows = [y.float() for y in (q[:, :, at : at + new], k[:, :, to : to + total], v[:, :, to : to + total])]
        assert (found[:, :, at : at + new] - attention(*rows, seen)).abs().max() < 2e-2
