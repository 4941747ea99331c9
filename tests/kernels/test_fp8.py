"""Linear layers in FP8: each product by itself, the gradient of a model, and where it must not be used."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from regpt.errors import UsageError
from regpt.kernels import fp8
from regpt.kernels.select import ops_of
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.layers import Linear
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.recompute import recompute_blocks

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, max_seq_len=32)
N, C, OUT = 64, 48, 80  # of one layer: all different, all multiples of 16


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output, of the sizes that training has."""
    return draw(0, N, C).bfloat16(), 0.02 * draw(1, OUT, C), draw(2, OUT), 1e-6 * draw(3, N, OUT).bfloat16()


def products(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Tensor]:
    given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = fp8.linear(*given)
    dx, dw, db = torch.autograd.grad(y, given, dy)
    return {"y": y.detach(), "dx": dx, "dw": dw, "db": db}


def by_hand(x: Tensor, mantissa: int, least: int, top: int) -> Tensor:
    """`x` in float64, rounded to a float of so many bits of mantissa whose smallest normal number is 2**least, after
    a scaling that puts the largest number between 2**top and twice that. On the CPU: a GPU's pow is not exact at
    powers of two, and a scale that is the last bit too small rounds every half up."""
    device, x = x.device, x.detach().cpu().double()
    scale = 2.0 ** (torch.floor(torch.log2(x.abs().max())) - top)
    scaled = x / scale
    exponent = torch.floor(torch.log2(scaled.abs().clamp(min=2.0**least))).clamp(min=least)
    step = 2.0 ** (exponent - mantissa)
    return (torch.round(scaled / step) * step * scale).to(device)  # halves to even, as the hardware does


def e4m3(x: Tensor) -> Tensor:
    return by_hand(x, mantissa=3, least=-6, top=7)


def e5m2(x: Tensor) -> Tensor:
    return by_hand(x, mantissa=2, least=-14, top=14)


def error(given: Tensor, exact: Tensor) -> float:
    return ((given.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- one layer -------------------------------------------------------------------------------------------------------


def test_each_product_is_that_of_the_operands_rounded_by_hand():
    """But for what sums and results are rounded to: bfloat16, and float32 for the gradient of the weight."""
    x, weight, bias, dy = layer()
    found, x8, w8, dy8 = products(x, weight, bias, dy), e4m3(x), e4m3(weight), e5m2(dy)
    assert error(found["y"], x8 @ w8.t() + bias.double()) < 3e-3
    assert error(found["dx"], dy8 @ w8) < 3e-3
    assert error(found["dw"], dy8.t() @ x8) < 1e-6
    assert error(found["db"], dy.double().sum(0)) < 1e-6


def test_each_product_is_as_far_from_the_exact_one_as_its_formats_imply():
    """Rounding alone makes 2.7 % (e4m3) and 5.3 % (e5m2) of normally distributed numbers; two independent errors add up
    as squares: 3.8 and 5.9 %."""
    x, weight, bias, dy = layer()
    found, (x, weight, dy) = products(x, weight, bias, dy), (z.double() for z in (x, weight, dy))
    assert 0.03 < error(found["y"].double() - bias.double(), x @ weight.t()) < 0.045
    assert 0.05 < error(found["dx"], dy @ weight) < 0.075
    assert 0.05 < error(found["dw"], dy.t() @ x) < 0.075


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_the_size_of_a_tensor_does_not_matter(size: float):
    x = draw(0, N, C)
    for dtype in (fp8.E4M3, fp8.E5M2):
        plain, scaled = fp8.quantized(x, dtype), fp8.quantized(size * x, dtype)
        assert error(scaled[0].double() * scaled[1].double() / size, x) < 1.3 * error(
            plain[0].double() * plain[1].double(), x
        )


@pytest.mark.parametrize("largest", [1.0, 1.9999999, 2.0, 3.5, 448.0, 57344.0, 2.0**-20])
def test_no_number_exceeds_the_largest_of_the_format(largest: float):
    x = largest * torch.linspace(-1, 1, 256).view(16, 16)
    for dtype, bound in ((fp8.E4M3, 448), (fp8.E5M2, 57344)):
        values, scale = fp8.quantized(x, dtype)
        assert bound / 4 < values.double().abs().max() <= bound
        assert torch.frexp(scale).mantissa == 0.5  # a power of two: scaling rounds nothing


def test_zeros_stay_zeros():
    found = products(torch.zeros(N, C), torch.zeros(OUT, C), torch.zeros(OUT), torch.zeros(N, OUT).bfloat16())
    assert all(not tensor.any() for tensor in found.values())
    x, weight, bias, dy = layer()
    assert error(products(torch.zeros_like(x), weight, bias, dy)["y"], bias.expand(N, OUT)) < 3e-3
    assert not products(x, weight, bias, torch.zeros_like(dy))["dw"].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_is_not_hidden(bad: float, which: int):
    given = list(layer())
    given[which][3] = bad
    found = products(*given)
    spoiled = {0: ("y", "dw"), 1: ("y", "dx"), 2: ("y",), 3: ("dx", "dw", "db")}[which]
    for name in spoiled:
        assert not found[name].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_types_of_what_they_are_gradients_of(dtype: torch.dtype):
    x, weight, bias, dy = layer()
    found = products(x.to(dtype).view(2, 2, N // 4, C), weight, bias, dy.view(2, 2, N // 4, OUT))
    assert [t.dtype for t in found.values()] == [torch.bfloat16, dtype, torch.float32, torch.float32]
    assert found["y"].shape == (2, 2, N // 4, OUT)
    assert found["dx"].shape == (2, 2, N // 4, C)


def test_an_output_s_gradient_may_lie_in_any_way():
    x, weight, bias, dy = layer()
    expected = products(x, weight, bias, dy)
    found = products(x.t().contiguous().t(), weight.t().contiguous().t(), bias, dy.t().contiguous().t())
    assert tiny.largest_error(found, expected) == 0
    spread = torch.ones((), dtype=torch.bfloat16).expand(N, OUT)  # as the gradient of a sum is
    assert tiny.largest_error(products(x, weight, bias, spread), products(x, weight, bias, spread.contiguous())) == 0


def test_the_backward_keeps_one_byte_a_number():
    x, weight, bias, _ = layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8.linear(x.requires_grad_(), weight.requires_grad_(), bias)
    assert sum(t.numel() * t.element_size() for t in kept) == N * C + OUT * C + 2 * 4


@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(N - 1, C, OUT), (8, C, OUT), (N, C - 8, OUT), (N, C, OUT + 8), (1, C, OUT)]
)
def test_sizes_that_do_not_fit_are_computed_as_under_bf16(rows: int, inner: int, outer: int):
    x, weight, bias = draw(0, rows, inner), draw(1, outer, inner).requires_grad_(), draw(2, outer)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fp8.linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_without_gradients_it_is_bitwise_bf16():
    x, weight, bias, _ = layer()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight, bias)
        assert not torch.equal(fp8.linear(x, weight.requires_grad_(), bias), expected)
        for without in (torch.no_grad(), torch.inference_mode()):
            with without:
                assert torch.equal(fp8.linear(x, weight, bias), expected)


# ---- a model ---------------------------------------------------------------------------------------------------------


class Rows(tiny.Rows):
    """Rows of 16, so that a micro-batch of any number of them can be computed in FP8."""

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(97, (8, 17), generator=torch.Generator().manual_seed(step))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def build(precision: str) -> Transformer:
    model = make_model(CONFIG, ops_of(precision, tiny.CPU))
    return initialize(model, seed=1).to(torch.float64 if precision == "fp64" else torch.float32)


def gradients(precision: str, *, model: Transformer | None = None, **options: int) -> dict[str, Tensor]:
    train = TrainConfig(precision=precision)  # type: ignore[arg-type]
    trainer = tiny.build_trainer(model or build(precision), Rows(**options), train=train)
    return {name: tensor.double() for name, tensor in tiny.step_gradients(trainer).items()}


def test_the_linear_layers_of_the_blocks_are_in_fp8_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    model, shapes, quantized = build("fp8"), [], fp8.quantized
    monkeypatch.setattr(fp8, "quantized", lambda x, dtype: shapes.append(tuple(x.shape)) or quantized(x, dtype))
    assert sum(isinstance(module, Linear) for module in model.modules()) == 4 * CONFIG.n_layer
    gradients("fp8", model=model)
    n, width = 8 * 16, CONFIG.n_embd
    forward = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    outputs = [(n, 3 * width), (n, width), (n, 4 * width), (n, width)]
    inputs = [(n, inner) for _, inner in forward]
    assert sorted(shapes) == sorted(CONFIG.n_layer * (forward + inputs + outputs))


def test_the_model_s_gradients_are_as_exact_as_eight_bits_allow():
    """Relative to float64: bfloat16 1 %, FP8 some 10 %: as many bits less as e5m2 has less."""
    exact = gradients("fp64")
    assert tiny.largest_error(gradients("bf16"), exact) < 0.02
    found = gradients("fp8")
    assert 0.03 < tiny.largest_error(found, exact) < 0.2
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-3)
    assert found["norm"].item() == pytest.approx(exact["norm"].item(), rel=0.03)


def test_rounding_is_no_bias():
    """Over several batches the errors average out: the mean gradient is nearer than one."""

    def mean(precision: str) -> Tensor:
        name = "h.0.mlp.c_fc.weight"
        found = []
        for step in range(6):
            rows = Rows()
            rows.rows = lambda _, step=step: Rows().rows(step)  # type: ignore[method-assign]
            train = TrainConfig(precision=precision)  # type: ignore[arg-type]
            found.append(tiny.step_gradients(tiny.build_trainer(build(precision), rows, train=train))[name].double())
        return torch.stack(found)

    exact, found = mean("fp64"), mean("fp8")
    assert error(found.mean(0), exact.mean(0)) < 0.7 * max(
        error(a, b) * b.norm() / exact.mean(0).norm() for a, b in zip(found, exact)
    )


def test_validation_and_sampling_are_bitwise_those_of_bf16():
    models = build("fp8"), build("bf16")
    idx, _ = Rows().rows(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(models[0](idx), models[1](idx))


def test_a_loss_curve_is_that_of_bf16():
    def curve(precision: str) -> list[float]:
        train = TrainConfig(steps=40, precision=precision)  # type: ignore[arg-type]
        optim = OptimConfig(lr=1e-2, warmup_steps=4)
        rows = Rows()
        rows.rows = lambda step: Rows().rows(step % 4)  # type: ignore[method-assign]
        trainer = tiny.build_trainer(build(precision), rows, train=train, optim=optim)
        return [tiny.update(trainer)["loss"] for _ in range(40)]

    ours, theirs = curve("fp8"), curve("bf16")
    assert theirs[-1] < theirs[0] - 1
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 0.03


def test_it_repeats_bitwise_recomputed_or_not():
    once = gradients("fp8")
    assert tiny.largest_error(gradients("fp8"), once) == 0
    assert tiny.largest_error(gradients("fp8", model=recompute_blocks(build("fp8"))), once) == 0


def test_micro_batches_differ_by_their_scales_only():
    """Each has maxima of its own; scales of powers of two are mostly the same for all that."""
    assert tiny.largest_error(gradients("fp8", micro_batch_rows=2), gradients("fp8")) < 0.03


# ---- where it cannot be had ------------------------------------------------------------------------------------------


def test_this_cpu_can():
    assert fp8.obstacle(tiny.CPU) is None
    assert ops_of("fp8", tiny.CPU) == replace(PLAIN, linear=fp8.linear)
    assert ops_of("bf16", tiny.CPU) is PLAIN


def test_an_older_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    expected = r"train\.precision is fp8, but FP8 needs compute capability 8\.9 or more, NVIDIA A100 has 8\.0; set "
    with pytest.raises(UsageError, match=expected):
        ops_of("fp8", torch.device("cuda"))


def test_a_pytorch_without_the_product_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def missing(*args: object, **options: object) -> Tensor:
        raise NotImplementedError("no kernel\nand a long explanation")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(UsageError, match=r"does not multiply FP8 on cpu \(no kernel\); set train\.precision to bf16"):
        ops_of("fp8", tiny.CPU)


def test_a_wrong_product_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "product", lambda a, b, *rest, **options: torch.zeros(64, 64))
    with pytest.raises(UsageError, match="a product in FP8 on cpu is wrong by 100%"):
        ops_of("fp8", tiny.CPU)
