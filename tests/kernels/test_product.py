"""Products of rows in Triton: on a GPU, or on a CPU in Triton's interpreter
(`TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_product.py`, with numpy below 2.4).
"""

import copy
import os

import pytest
import torch

import tiny
from regpt.engine.engine import Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.products import FixedOrder, Int8Product, quantize
from regpt.engine.request import Request
from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.model.layers import Linear
from regpt.train.precision import writing

pytest.importorskip("triton")
product = pytest.importorskip("regpt.kernels.product")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPE = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="tensor cores")
SHAPES = [(1, 64, 32), (3, 96, 40), (70, 160, 33)]  # rows, K, N


def operands(rows: int, K: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(*shape, generator=source).to(DEVICE, DTYPE) for shape in ((rows, K), (N, K), (N,)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_torchs(shape, biased):
    x, weight, bias = operands(*shape)
    found = product.multiply_rows(x, weight, bias if biased else None, out_dtype=torch.float32)
    expected = x.float() @ weight.float().t() + (bias.float() if biased else 0)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-5 * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_with_weights_in_eight_bits_is_that_with_the_rounded_weights(shape):
    x, weight, bias = operands(*shape)
    rounded = Int8Product(weight, None, torch.float32)
    found = rounded(x, weight, bias)
    expected = x.float() @ rounded.weight().to(DTYPE).float().t() + bias.float()
    assert (found - expected).abs().max() < 2e-5 * shape[1]
    assert (rounded.weight() - weight.float()).abs().max() > 0


@on_gpu
@pytest.mark.parametrize(("K", "N"), [(768, 2304), (768, 50257), (3072, 768), (2048, 512)])
def test_the_bits_of_a_row_depend_on_no_other_row(K, N):
    x, weight, bias = operands(700, K, N)
    whole = product.multiply_rows(x, weight, bias)
    normed = product.norm_rows(x, weight[0], 1e-5)
    for rows in (1, 2, 17, 64, 65, 256):
        for start in (0, 5, 300):
            part = slice(start, start + rows)
            assert torch.equal(product.multiply_rows(x[part], weight, bias), whole[part])
            assert torch.equal(product.norm_rows(x[part], weight[0], 1e-5), normed[part])


def sized(family: str, n_embd: int, **more: int) -> ModelConfig:
    """Four heads, three layers, 128 positions."""
    return ModelConfig(family=family, n_layer=3, n_head=4, n_embd=n_embd, vocab_size=97, max_seq_len=128, **more)


def requests() -> list[Request]:
    source = torch.Generator().manual_seed(1)
    given = []
    for i in range(96):
        prompt = torch.randint(97, (1 + i % 23,), generator=source).tolist()
        prompt = list(range(20)) + prompt if i % 4 == 0 else prompt  # a quarter begins alike
        given.append(Request(prompt, 1 + i % 17, SamplingOptions(temperature=0.7 + i % 3, top_k=i % 2 * 20), i))
    return given


@on_gpu
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox"])
def test_texts_in_bf16_invariant_depend_on_nothing_else_in_the_batch(family):
    heads = {"n_kv_head": 2} if family in ("llama", "qwen3") else {}
    model = tiny.build_model(config=sized(family, 256, **heads), dtype=torch.float32).eval().to(DEVICE)
    writing(model, "bf16-invariant", DEVICE)
    assert isinstance(model.ops.head, FixedOrder)
    ways = [
        {"max_rows": 1, "graphs": False, "prefix_cache": False},
        {"max_rows": 3, "chunk_tokens": 7},
        {"max_rows": 33, "page_size": 4, "chunk_tokens": 50},
        {"max_rows": 96, "page_size": 32},
    ]
    texts = [Engine(model, cache_tokens=128 * way["max_rows"], **way).run(requests()) for way in ways]
    texts.append(Engine(model, max_rows=40).run([*requests()[::-1]])[::-1])
    assert all(found == texts[0] for found in texts)


@on_gpu
def test_the_products_of_experts_depend_on_the_batch_and_are_refused():
    model = tiny.build_model(config=tiny.FAMILY_CONFIGS["mixtral"], dtype=torch.float32).to(DEVICE)
    with pytest.raises(UsageError, match="bf16-invariant is not for mixtures of experts; choose bf16 or fp32"):
        writing(model, "bf16-invariant", DEVICE)


@on_gpu
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_model_in_eight_bits_is_that_with_its_rounded_weights(family):
    model = tiny.build_model(config=sized(family, 128), dtype=torch.float32).eval().to(DEVICE)
    whole = copy.deepcopy(model)
    quantize(model)
    assert model.dtype == torch.bfloat16
    for theirs, ours in zip(whole.modules(), model.modules()):
        if isinstance(ours, Linear) and isinstance(ours.ops.linear, Int8Product):
            theirs.weight.copy_(ours.ops.linear.weight())
    whole.head_weight.copy_(model.ops.head.weight())
    idx = torch.arange(60, device=DEVICE)[None] % 97
    expected, halved = whole(idx), copy.deepcopy(whole).to(torch.bfloat16)(idx)
    assert (model(idx) - expected).norm() < 1.5 * (halved - expected).norm()  # as exact as bfloat16 is
    texts = Engine(model, max_rows=4).run([Request([i, 5, 7], 20, SamplingOptions(), i) for i in range(9)])
    assert all(len(text) == 20 for (text,) in texts)
