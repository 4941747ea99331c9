"""The head in chunks of rows against the plain operation, finite differences, and the memory that it may take."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from regpt.data.batch import Batch
from regpt.model import head
from regpt.model.head import (
    IGNORE_INDEX,
    chunk_rows,
    cross_entropy_with_z_loss,
    in_chunks,
    linear_cross_entropy,
    padded_logits,
)
from regpt.tools.plan.memory import LiveBytes
from regpt.train.objective import NextToken

pytestmark = [  # torch's own, in its compiler
    tiny.IMPORTS_COMPILER,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def targets_of(N: int, n_vocab: int, ignored: float, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(n_vocab, (N,), generator=generator)
    return targets.masked_fill(torch.rand(N, generator=generator) < ignored, IGNORE_INDEX)


def by_hand(
    hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Row after row, from the formulas of the module's docstring."""
    squares = torch.zeros((), dtype=torch.float64)
    loss = 0 * hidden.sum() + 0 * weight.sum()
    for x, target in zip(hidden, targets.tolist()):
        if target != IGNORE_INDEX:
            u = weight[:n_vocab] @ x
            u = softcap * torch.tanh(u / softcap) if softcap else u
            log_z = torch.log(torch.exp(u - u.max()).sum()) + u.max()
            loss = loss + log_z - u[target] + z_loss * log_z**2
            squares = squares + log_z.detach() ** 2
    return loss, squares


def relative(given: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length, which may be 0 only where both are."""
    return float((given.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def found(sums: tuple[Tensor, Tensor], of: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss, the squares, and the gradients of a multiple of the loss."""
    return [*(x.detach() for x in sums), *torch.autograd.grad(sums[0] * -2.5, of)]


def largest_error(given: list[Tensor], expected: list[Tensor]) -> float:
    return max(map(relative, given, expected))


@settings(max_examples=60)
@given(
    N=st.integers(1, 9),
    n_vocab=st.integers(2, 12),
    padding=st.integers(0, 5),
    rows=st.integers(1, 11),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    softcap=st.sampled_from([0.0, 3.0, 30.0]),  # 1 - tanh² multiplies a rounding of x by 2x/c, for both sides
    z_loss=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_chunks_give_the_plain_loss_and_gradients(N, n_vocab, padding, rows, ignored, softcap, z_loss, scale):
    hidden, weight = drawn(N, 3, scale=scale), drawn(n_vocab + padding, 3, seed=1, scale=scale)
    targets = targets_of(N, n_vocab, ignored)
    of = hidden, weight
    chunks = found(in_chunks(*of, targets, n_vocab, softcap, z_loss, rows), of)
    plain = found(cross_entropy_with_z_loss(*of, targets, n_vocab, z_loss, softcap), of)
    assert largest_error(chunks, plain) < 1e-13
    assert largest_error(plain, found(by_hand(*of, targets, n_vocab, softcap, z_loss), of)) < 1e-12


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.2])
def test_gradients_are_those_of_finite_differences(softcap: float, z_loss: float):
    hidden, weight, targets = drawn(5, 3), drawn(8, 3, seed=1), targets_of(5, 6, 0.3)

    def loss() -> Tensor:
        return in_chunks(hidden, weight, targets, 6, softcap, z_loss, 2)[0]

    for tensor, grad in zip((hidden, weight), torch.autograd.grad(loss(), (hidden, weight))):
        values, found = tensor.detach().view(-1), []
        for k in range(len(values)):
            differences = []
            for step in (1e-5, -2e-5, 1e-5):  # up, down, and back
                values[k] += step
                differences.append(loss().item())
            found.append((differences[0] - differences[1]) / 2e-5)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64).view_as(grad), grad, rtol=1e-6, atol=1e-7)


def test_padded_rows_of_the_weight_have_no_gradient():
    hidden, weight, targets = drawn(7, 3), drawn(16, 3, seed=1), targets_of(7, 11, 0.2)
    loss, squares = in_chunks(hidden, weight, targets, 11, 5.0, 0.1, 3)
    assert not squares.requires_grad
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad[11:] == 0).all()
    assert (grad[:11] != 0).any(dim=1).all()


def test_a_second_backward_is_refused():
    hidden, weight = drawn(7, 3), drawn(16, 3, seed=1)
    loss, _ = in_chunks(hidden, weight, targets_of(7, 11, 0.2), 11, 0.0, 0.0, 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward"):
        loss.backward()


def test_without_a_valid_target_loss_and_gradients_are_zero():
    hidden, weight = drawn(5, 3), drawn(8, 3, seed=1)
    loss, squares = in_chunks(hidden, weight, torch.full((5,), IGNORE_INDEX), 7, 0.0, 0.1, 2)
    assert (loss.item(), squares.item()) == (0, 0)
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_has_no_gradient_and_the_other_has_its_own(frozen: str):
    hidden, weight, targets = drawn(5, 3), drawn(8, 3, seed=1), targets_of(5, 8, 0.2)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 8), (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    in_chunks(hidden, weight, targets, 8, 0.0, 0.0, 2)[0].backward()
    learning, at = (weight, 1) if frozen == "hidden" else (hidden, 0)
    assert learning.grad is not None
    assert relative(learning.grad, expected[at]) < 1e-13
    assert (hidden if frozen == "hidden" else weight).grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_16_bits_the_chunks_are_as_exact_as_the_whole(dtype: torch.dtype, autocast: bool):
    """Distances to float64, of float32 parameters under autocast and of 16-bit ones."""
    targets = targets_of(96, 300, 0.1)
    exact = drawn(96, 64), drawn(320, 64, seed=1, scale=0.2)
    given = tuple(x.detach().to(torch.float32 if autocast else dtype).requires_grad_() for x in exact)
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    reference = linear_cross_entropy(*exact, targets, 300)
    wanted = torch.autograd.grad(reference, exact)
    found = {}
    for name in ("whole", "chunks"):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            if name == "whole":
                loss = linear_cross_entropy(*given, targets, 300)
            else:
                loss = in_chunks(*given, targets, 300, 0.0, 0.0, 17)[0]
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, given)
        assert [g.dtype for g in grads] == [x.dtype for x in given]
        found[name] = [relative(loss.detach(), reference.detach()), *map(relative, grads, wanted)]
    assert found["chunks"][0] < max(1e-6, 1.1 * found["whole"][0])
    for ours, theirs in zip(found["chunks"][1:], found["whole"][1:]):
        assert ours < 1.25 * theirs


def test_a_certain_prediction_keeps_its_small_gradient():
    """p - 1 of a target's logit, far below the rounding of p."""
    hidden, weight = torch.tensor([[30.0]]).requires_grad_(), torch.tensor([[1.0], [0.0]]).requires_grad_()
    (grad,) = torch.autograd.grad(in_chunks(hidden, weight, torch.tensor([0]), 2, 0.0, 0.0, 1)[0], hidden)
    assert grad.item() == pytest.approx(-torch.tensor(30.0, dtype=torch.float64).neg().exp().item(), rel=1e-5)


# ---- memory ----------------------------------------------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """A context that records the most elements of a tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("gradient", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_large_vocabulary_never_exist_all_at_once(precision: torch.dtype, gradient: bool):
    N, V = 5000, 66_000
    hidden, weight = (torch.zeros(n, 1, dtype=precision, requires_grad=gradient) for n in (N, V))
    seen = LargestOutput()
    with seen:
        loss = linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64), V)
        if gradient:
            loss.backward()
    assert loss.item() == pytest.approx(N * torch.tensor(V).log().item(), rel=1e-5)
    assert seen.elements > N * V / 8
    assert seen.elements <= head.CHUNK_BYTES // precision.itemsize < N * V


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16"])
def test_a_head_of_128256_takes_less_than_a_gib_on_top_of_inputs_and_gradients(precision: str, softcap: float):
    """On tensors without memory; the gradient of the weight is one in float32, which its sum over chunks needs."""
    N, V, C = 16_384, 128_256, 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with FakeTensorMode():
        of = tuple(torch.empty(n, C, dtype=dtype, requires_grad=True) for n in (N, V))
        targets = torch.empty(N, dtype=torch.int64)
        live = LiveBytes([*of, targets])
        with live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16 autocast"):
                loss = linear_cross_entropy(*of, targets, V, softcap)
            torch.autograd.grad(loss / 7, of)
    extra = max(live.history) - 4 * V * C - dtype.itemsize * N * C
    assert 0.43 < extra / 2**30 < 1


@pytest.mark.parametrize(
    ("N", "V", "dtype", "rows"),
    [
        (65_536, 50_304, torch.bfloat16, 0),  # as measured
        (131_072, 50_304, torch.bfloat16, 4608),
        (16_384, 128_256, torch.bfloat16, 1792),
        (16_384, 128_256, torch.float32, 896),
        (523, 128_256, torch.float32, 0),
        (524, 128_256, torch.float32, 896),
        (70, 2**20 + 1, torch.float64, 55),
        (3, 2**26, torch.float64, 1),
    ],
)
def test_a_chunk_is_of_448_mib_and_small_logits_are_whole(N: int, V: int, dtype: torch.dtype, rows: int):
    assert chunk_rows(N, V, dtype) == rows


def test_small_logits_take_the_operations_of_the_whole_bit_for_bit():
    hidden, weight, targets = (
        drawn(9, 4, dtype=torch.float32),
        drawn(16, 4, seed=1, dtype=torch.float32),
        targets_of(9, 11, 0.3),
    )
    logits = padded_logits(hidden, weight, 11)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    given = linear_cross_entropy(hidden, weight, targets, 11)
    assert torch.equal(given, expected)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (given, expected))):
        assert torch.equal(ours, theirs)


# ---- in training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chunked(monkeypatch):
    """All logits are in chunks of five rows."""
    monkeypatch.setattr(head, "chunk_rows", lambda N, V, dtype: 5)


def step(loss_sum: Callable[[Batch], Any], model: Any) -> tuple[float, float, list[Tensor]]:
    loss, extras = loss_sum(Batch(*tiny.Rows().rows(0)))
    grads = torch.autograd.grad(loss / 7, list(model.parameters()))
    return loss.item(), extras["z_loss"].item(), list(grads)


def check_step(given: tuple, expected: tuple, tolerance: float) -> None:
    assert given[:2] == pytest.approx(expected[:2], rel=tolerance)
    assert max(map(relative, given[2], expected[2])) < tolerance


def test_a_training_step_in_chunks_is_that_of_the_whole(monkeypatch):
    model = tiny.build_model()
    expected = step(NextToken(model, z_loss=0.1).loss_sum, model)
    monkeypatch.setattr(head, "chunk_rows", lambda N, V, dtype: 5)
    check_step(step(NextToken(model, z_loss=0.1).loss_sum, model), expected, 1e-13)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_compiled_it_is_one_graph_with_the_same_gradients(backend: str, monkeypatch):
    model = tiny.build_model()
    expected = step(NextToken(model, z_loss=0.1).loss_sum, model)
    monkeypatch.setattr(head, "chunk_rows", lambda N, V, dtype: 5)
    torch._dynamo.reset()
    compiled = torch.compile(NextToken(model, z_loss=0.1).loss_sum, backend=backend, fullgraph=True, dynamic=False)
    check_step(step(compiled, model), expected, 1e-13)


def test_compiled_under_autocast_it_gives_the_bits_of_the_eager_form(chunked):
    model = tiny.build_model(dtype=torch.float32)

    def loss_sum(batch: Batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return NextToken(model, z_loss=0.1).loss_sum(batch)

    torch._dynamo.reset()
    found = [step(form, model) for form in (loss_sum, torch.compile(loss_sum, backend="aot_eager", fullgraph=True))]
    assert found[0][:2] == found[1][:2]
    assert all(map(torch.equal, found[0][2], found[1][2]))


def test_a_validation_computes_no_gradient(chunked, monkeypatch):
    model = tiny.build_model()
    seen = []
    monkeypatch.setattr(head, "add_product", lambda *args: seen.append(args))
    with torch.no_grad():
        NextToken(model, z_loss=0.1).loss_sum(Batch(*tiny.Rows().rows(0)))
    assert not seen
