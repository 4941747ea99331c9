"""Linear layers in FP8 on a CUDA device that multiplies it (compute capability 8.9 or more), compiled and not."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from kernels.test_fp8 import e4m3, e5m2
from kernels.test_fused_on_gpu import CONFIG, B, T, documents, error, gradients, tokens
from regpt.data.batch import Batch
from regpt.kernels import fp8
from regpt.kernels.cublaslt import Products
from regpt.kernels.select import ops_of, select_kernels
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.tools.doctor.device import step_in
from regpt.train.backend import make_loss_sum
from regpt.train.peak import matmul_flops
from regpt.train.recompute import recompute_blocks

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch does, in Dynamo
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.LEAST_CAPABILITY,
        reason="FP8 needs compute capability 8.9",
    ),
]
SHAPES = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (1600, 4800), (1600, 6400), (6400, 1600), (48, 80)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def build(precision: str) -> Transformer:
    return initialize(make_model(CONFIG, ops_of(precision, DEVICE)).to(DEVICE), 0)


def loss_of(model: Transformer, compile: bool = False, **options: bool) -> Callable[[Batch], Tensor]:
    return make_loss_sum(model, "fp8", DEVICE, compile, **options)


def layer(inner: int, outer: int, rows: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(0)
    x, weight, bias, dy = (
        torch.randn(shape, device=DEVICE, generator=draw)
        for shape in ((rows, inner), (outer, inner), (outer,), (rows, outer))
    )
    return x.bfloat16(), 0.02 * weight, bias, (1e-6 * dy).bfloat16()


def products(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Tensor]:
    given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = linear(*given)
    dx, dw, db = torch.autograd.grad(y, given, dy)
    return {"y": y.detach(), "dx": dx, "dw": dw, "db": db}


def test_this_device_can():
    assert fp8.obstacle(DEVICE) is None
    assert "relative error" in str(step_in(DEVICE, "fp8")())
    assert matmul_flops(DEVICE, "fp8", 4096) > matmul_flops(DEVICE, "bf16", 4096)


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_each_product_is_that_of_the_operands_rounded_by_hand(inner: int, outer: int, compile: bool):
    """But for what results are rounded to, and the forward's sums of few bits (`use_fast_accum`), about 1e-3."""
    x, weight, bias, dy = layer(inner, outer)
    linear = torch.compile(fp8.linear, dynamic=False) if compile else fp8.linear
    found, x8, w8, dy8 = products(linear, x, weight, bias, dy), e4m3(x), e4m3(weight), e5m2(dy)
    exact = {"y": x8 @ w8.t() + bias.double(), "dx": dy8 @ w8, "dw": dy8.t() @ x8, "db": dy.double().sum(0)}
    wrong = error({name: tensor.double() for name, tensor in found.items()}, exact)
    print(inner, outer, compile, {name: f"{value:.1e}" for name, value in wrong.items()})
    assert wrong["y"] < 4e-3  # 2.2e-3 on Hopper, of which bfloat16 makes 1.7e-3
    assert wrong["dx"] < 3e-3
    assert wrong["dw"] < 5e-4
    assert wrong["db"] < 1e-4


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_zeros_and_what_is_not_finite(compile: bool):
    linear = torch.compile(fp8.linear, dynamic=False) if compile else fp8.linear
    given = layer(256, 512)
    for i in range(4):
        zero = [torch.zeros_like(tensor) if k == i else tensor for k, tensor in enumerate(given)]
        assert all(tensor.isfinite().all() for tensor in products(linear, *zero).values())
    zeros = products(linear, *(torch.zeros_like(tensor) for tensor in given))
    assert not any(tensor.any() for tensor in zeros.values())
    for bad in (float("nan"), float("inf")):
        for i, spoiled in enumerate((("y", "dw"), ("y", "dx"), ("y",), ("dx", "dw"))):
            broken = [tensor.clone() for tensor in given]
            broken[i][3] = bad
            found = products(linear, *broken)
            assert not any(bool(found[name].isfinite().all()) for name in spoiled), (bad, i)


def test_a_layer_repeats_bitwise():
    given = layer(768, 3072)
    for linear in (fp8.linear, torch.compile(fp8.linear, dynamic=False)):
        once, again = products(linear, *given), products(linear, *given)
        assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_operands_may_lie_in_any_way(compile: bool):
    """The product takes rows only; a gradient comes as a view, or as one number spread over all."""
    linear = torch.compile(fp8.linear, dynamic=False) if compile else fp8.linear
    x, weight, bias, dy = layer(256, 512)
    turned = (x.t().contiguous().t(), weight.t().contiguous().t(), bias, dy.t().contiguous().t())
    expected, found = products(fp8.linear, x, weight, bias, dy), products(linear, *turned)
    assert all(torch.equal(found[name], expected[name]) for name in ("y", "dx", "dw"))
    spread = dy[:1, :1].expand_as(dy)
    expected, found = (products(linear, x, weight, bias, z) for z in (spread.contiguous(), spread))
    assert all(torch.equal(found[name], expected[name]) for name in ("y", "dx", "dw"))


def test_without_gradients_and_with_odd_sizes_it_is_bitwise_bf16():
    x, weight, bias, _ = layer(256, 512)
    weight.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(fp8.linear(x[:100], weight, bias), torch.nn.functional.linear(x[:100], weight, bias))
        with torch.no_grad():
            assert torch.equal(fp8.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_the_model_s_gradients_are_as_exact_as_eight_bits_allow(compile: bool, recomputed: bool, masked: bool):
    given = documents() if masked else {}
    reference = build("bf16")
    exact = gradients(reference, make_loss_sum(reference, "fp32", DEVICE, compile=False), **given)
    model = recompute_blocks(build("fp8")) if recomputed else build("fp8")
    wrong = error(gradients(model, loss_of(model, compile), **given), exact)
    print({name: f"{value:.1e}" for name, value in wrong.items()})
    assert 0.01 < max(wrong.values()) < 0.25
    assert wrong["loss"] < 1e-3
    if compile:
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
def test_the_fused_path_is_as_exact_as_the_plain_one_in_fp8(masked: bool):
    given = documents() if masked else {}
    reference = build("bf16")
    exact = gradients(reference, make_loss_sum(reference, "fp32", DEVICE, compile=False), **given)
    model = build("fp8")
    assert select_kernels("fused", model, DEVICE, "fp8").name == "fused"
    plain = error(gradients(model, loss_of(model), **given), exact)
    fused = error(gradients(model, make_loss_sum(model, "fp8", DEVICE, True, "fused"), **given), exact)
    print({name: f"{value:.1e} {plain[name]:.1e}" for name, value in fused.items()})
    for name, bound in plain.items():
        assert fused[name] < max(1.3 * bound, 1e-4), f"{name}: fused {fused[name]:.1e}, plain {bound:.1e}"


def test_fused_micro_batches_add_up_updates_are_seen_and_validation_is_bf16():
    model = build("fp8")
    loss_sum = make_loss_sum(model, "fp8", DEVICE, True, "fused")
    bf16 = make_loss_sum(model, "bf16", DEVICE, True, "fused")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    whole = gradients(model, loss_sum)
    for _ in range(3):  # as it is launched kernel by kernel, captured and replayed
        idx, targets = tokens()
        model.zero_grad()
        for half in (slice(0, 3), slice(3, 6)):
            (loss_sum(Batch(idx[half], targets[half])) / (B * T)).backward()
        for name, p in model.named_parameters():
            assert ((p.grad - whole[name]).norm() / whole[name].norm()).item() < 0.1, name
    optimizer.step()
    changed = gradients(model, loss_sum)
    assert changed["loss"] < whole["loss"] - 0.02
    with torch.no_grad():
        batch = Batch(*tokens(1))
        assert loss_sum(batch).item() == bf16(batch).item()
        odd = Batch(*(tensor[:, :37].contiguous() for tensor in tokens(1)))
    model.zero_grad()
    loss = loss_sum(odd)  # 6 · 37 tokens are no multiple of 16
    assert loss.item() == bf16(odd).item()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("added", [False, True], ids=["overwritten", "added"])
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_of_cublaslt_in_fp8(wide: torch.dtype, added: bool):
    products = Products(DEVICE)
    x, weight, bias, dy = layer(768, 2304)
    (x8, sx), (w8, sw) = (fp8.quantized(tensor, fp8.E4M3) for tensor in (x, weight))
    dy8, sdy = fp8.quantized(dy, fp8.E5M2)
    if wide == torch.bfloat16:
        a, b, scales, options = x8, w8, (sx, sw), {"epilogue": "bias", "bias": bias.bfloat16(), "fast": True}
    else:
        a, b, scales, options = fp8.transposed(dy8), fp8.transposed(x8), (sdy, sx), {}
    exact = (a.double() * scales[0].double()) @ (b.double() * scales[1].double()).T
    before = exact.mean() + exact.std() * torch.randn(exact.shape, device=DEVICE)
    expected = exact + (bias.bfloat16().double() if wide == torch.bfloat16 else 0.0)
    expected = expected + before.to(wide).double() if added else expected
    out = before.to(wide) if wide == torch.float32 else torch.empty_like(before, dtype=wide)
    given = {"add": out if wide == torch.float32 else before.to(wide)} if added else {}
    found = products(a, b, out, transpose_b=True, scales=scales, **options, **given)
    assert found is out
    assert ((found.double() - expected).norm() / expected.norm()).item() < (3e-3 if wide == torch.bfloat16 else 3e-4)


def test_training_and_validation_are_two_graphs_however_long():
    model = build("fp8")
    loss_sum, plain = loss_of(model, True), make_loss_sum(model, "bf16", DEVICE, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = last = 0.0
    for step in range(12):
        loss = loss_sum(Batch(*tokens(0))) / (B * T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first, last = first or loss.item(), loss.item()
        with torch.no_grad():
            batch = Batch(*tokens(step))
            assert loss_sum(batch).item() == pytest.approx(plain(batch).item(), rel=2e-3)
    assert last < first - 0.5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_a_loss_curve_is_that_of_bf16():
    curves = {}
    for precision in ("fp8", "bf16"):
        model = build(precision)
        loss_sum = make_loss_sum(model, precision, DEVICE, compile=False)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curves[precision] = []
        for step in range(30):
            loss = loss_sum(Batch(*tokens(step % 3))) / (B * T)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curves[precision].append(loss.item())
    assert curves["bf16"][-1] < curves["bf16"][0] - 1
    print(max(abs(a - b) for a, b in zip(*curves.values())))
    assert max(abs(a - b) for a, b in zip(*curves.values())) < 0.1
