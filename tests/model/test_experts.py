"""Mixtures of experts: against sums written out token by token, against the loop; routers, sizes, refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regpt.errors import UsageError
from regpt.model.config import ModelConfig
from regpt.model.experts import LlamaOfExperts, Router
from regpt.model.families import make_model
from regpt.model.grouped import Matrices, experts_grouped, looped_product
from regpt.model.ops import PLAIN
from regpt.model.weights import count_parameters, initialize, load_weights, state_tensors
from regpt.train.recompute import recompute_blocks

SMALL = ModelConfig("mixtral", n_layer=2, n_head=4, n_embd=32, vocab_size=50, max_seq_len=16, n_inner=24, n_expert=4)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(N: int, E: int, k: int, C: int, width: int, dtype: torch.dtype, *, unused: int = 0) -> list[Any]:
    """x, (chosen, weights), (gate, up, down); the last `unused` experts have no tokens."""
    scores = drawn(N, E, seed=1)
    scores[:, E - unused :] = -math.inf
    weights, chosen = scores.topk(k, dim=1)
    matrices = [drawn(E, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(width, C)] * 2 + [(C, width)])]
    return [drawn(N, C, dtype=dtype), (chosen, weights.softmax(1).to(dtype)), tuple(matrices)]


def experts_in_loop(
    x: Tensor, routing: tuple[Tensor, Tensor], matrices: Matrices, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `experts_grouped` promises, one expert after the other."""
    chosen, weights = routing
    y = torch.zeros_like(x)
    for expert, (gate, up, down) in enumerate(zip(*matrices)):
        token, slot = torch.where(chosen == expert)  # (n,) each
        h = x[token]  # (n, C)
        h = F.linear(act(F.linear(h, gate)) * F.linear(h, up), down)
        y = y.index_add(0, token, (h * weights[token, slot, None]).to(y.dtype))
    return y


def results(experts: Any, x: Tensor, routing: tuple[Tensor, Tensor], matrices: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of a sum of it."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, routing[1], *matrices)]
    y = experts(leaves[0], (routing[0], leaves[1]), tuple(leaves[2:]), F.silu)
    (y * drawn(*y.shape, seed=9, dtype=y.dtype)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, int]:
    E = draw(st.integers(1, 6))
    k = draw(st.integers(1, E))
    unused = draw(st.integers(0, E - k))
    sizes = {"C": draw(st.integers(1, 9)), "width": draw(st.integers(1, 9))}
    return {"N": draw(st.integers(1, 12)), "E": E, "k": k, "unused": unused} | sizes


@settings(max_examples=60, deadline=None)
@given(cases())
def test_experts_are_the_papers_sum_token_by_token(given: dict[str, int]):
    """Shazeer et al. 2017, eq. 1: one expert, all experts, experts without tokens and a single token included."""
    x, (chosen, weights), (gate, up, down) = case(**given, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for n in range(len(x)):
        for expert, weight in zip(chosen[n].tolist(), weights[n]):
            inner = gate[expert] @ x[n]
            expected[n] += weight * (down[expert] @ (inner / (1 + (-inner).exp()) * (up[expert] @ x[n])))
    for experts in (experts_in_loop, experts_grouped):
        y = experts(x, (chosen, weights), (gate, up, down), F.silu)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([1, 4]))
def test_grouped_products_have_the_loops_outputs_and_gradients(given: dict[str, int], multiple: int):
    """In float32: sizes that torch groups, multiples of 4, and others."""
    given = given | {name: multiple * given[name] for name in ("C", "width")}
    x, routing, matrices = case(**given, dtype=torch.float32)
    for ours, loops in zip(*(results(f, x, routing, matrices) for f in (experts_grouped, experts_in_loop))):
        torch.testing.assert_close(ours, loops, rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    x, routing, matrices = case(6, 4, 2, 8, 16, torch.float32, unused=2)
    _, _, _, *of_matrices = results(experts_grouped, x, routing, matrices)
    for gradient in of_matrices:
        assert not gradient[2:].any()
        assert gradient[:2].flatten(1).any(1).all()


def test_grouped_products_in_bfloat16_are_near_the_exact_ones():
    x, routing, matrices = case(40, 4, 2, 32, 64, torch.float64)
    exact = results(experts_in_loop, x, routing, matrices)
    low = [one.bfloat16() for one in (x, routing[1], *matrices)]
    found = results(experts_grouped, low[0], (routing[0], low[1]), tuple(low[2:]))
    for ours, expected in zip(found, exact):
        assert (ours.double() - expected).norm() / expected.norm() < 0.02


def test_under_autocast_experts_multiply_in_bfloat16_and_the_router_in_float32():
    model, routes = initialize(make_model(SMALL), 1), []
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(torch.arange(8)[None], routes=routes)
    assert [routing.logits.dtype for routing in routes] == [torch.float32] * 2
    exact = make_model(SMALL).double()
    expected = load_weights(exact, state_tensors(model)).hidden(torch.arange(8)[None])
    assert 1e-4 < (hidden.double() - expected).norm() / expected.norm() < 0.02


def test_the_loop_as_an_operation_gives_the_models_loss():
    idx = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    for config in (SMALL, replace(SMALL, n_inner=7, n_expert_shared=2)):
        grouped = initialize(make_model(config), 1)
        loop = initialize(make_model(config, replace(PLAIN, experts=experts_in_loop)), 1)
        torch.testing.assert_close(grouped(idx), loop(idx), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_blocks_have_the_eager_ones_gradients_in_one_graph(low: bool):
    model, idx = initialize(make_model(replace(SMALL, n_layer=1)), 1), torch.arange(16)[None]

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model.hidden(idx).float().square().sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        run().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    tolerance = 0.03 if low else 1e-5
    assert len(found[0]) == len(list(model.parameters()))
    for eager, compiled in zip(*found):
        assert (eager - compiled).norm() <= tolerance * eager.norm()


def test_recomputed_blocks_append_their_routing_once_and_have_the_same_gradients():
    idx, found = torch.arange(16)[None], []
    for recomputed in (False, True):
        model, routes = initialize(make_model(SMALL), 1), []
        model = recompute_blocks(model) if recomputed else model
        loss = model.hidden(idx, routes=routes).square().sum() + sum(r.logits.square().sum() for r in routes)
        loss.backward()
        assert len(routes) == SMALL.n_layer
        found.append([loss, *(p.grad for p in model.parameters()), *(r.chosen for r in routes)])
    assert all(torch.equal(one, other) for one, other in zip(*found))


# ---- routers


def router(bias: list[float] | None = None, **changes: Any) -> Router:
    module = Router(replace(SMALL, n_embd=4, n_head=1, expert_bias=bias is not None, **changes).resolved())
    module.weight.data = torch.eye(4)  # logits are the input
    if bias is not None and module.bias is not None:
        module.bias.data = torch.tensor(bias)
    return module


def test_weights_of_the_chosen_experts_are_their_softmax_and_add_up_to_1_where_asked():
    x = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    share = x[0].exp() / x[0].exp().sum()
    weights, routing = router(norm_topk=False)(x)
    assert routing.chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, share[None, [1, 2]])
    weights, _ = router()(x)
    torch.testing.assert_close(weights, share[None, [1, 2]] / share[[1, 2]].sum())


def test_a_bias_changes_the_choice_but_not_the_weights_and_has_no_gradient():
    x = torch.tensor([[1.0, 3.0, 2.0, 0.0]], requires_grad=True)
    module = router([0.0, 0.0, 0.0, 1.0], norm_topk=False)
    weights, routing = module(x)
    assert routing.chosen.tolist() == [[3, 1]]
    torch.testing.assert_close(weights, x.softmax(1)[:, [3, 1]])
    weights.sum().backward()
    assert module.bias is not None
    assert module.bias.grad is None


def test_biases_are_parameters_that_start_at_zero_and_no_optimizer_moves():
    model = initialize(make_model(replace(SMALL, expert_bias=True)), 1)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("gate.bias")}
    assert len(biases) == 2
    assert not any(p.requires_grad or p.any() for p in biases.values())


# ---- sizes


def test_products_of_a_token_are_those_of_its_experts():
    """By hand: attention, router, three matrices for each of 2 chosen and 1 shared expert, the head."""
    config = replace(SMALL, n_expert_shared=1)
    model = make_model(config)
    assert isinstance(model, LlamaOfExperts)
    matrix = 24 * 32
    active = 4 * 32 * 32 + 4 * 32 + (2 + 1) * 3 * matrix
    assert model.matmul_parameters() == 2 * active + 50 * 32
    assert model.idle_parameters() == 2 * 2 * 3 * matrix
    assert count_parameters(model) == 2 * (active + 2 * 32) + 50 * 32 + 32 + model.idle_parameters()


def test_initial_experts_differ_and_have_the_deviation_of_other_matrices():
    model = initialize(make_model(replace(SMALL, n_inner=256, n_embd=256)), 1)
    weights = state_tensors(model)
    for name, std in (("up_proj", 0.02), ("down_proj", 0.02 / math.sqrt(2 * 2))):
        experts = weights[f"layers.0.mlp.experts.{name}.weight"]
        torch.testing.assert_close(experts.flatten(1).std(1), torch.full((4,), std), rtol=0.02, atol=0)
        assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("llama", {"n_expert": 4}, "model.n_expert is 4, but llama has no experts; .* mixtral, olmoe, qwen3_moe"),
        ("gpt2", {"expert_bias": True}, "model.expert_bias is True, but gpt2 has no experts"),
        ("mixtral", {"n_expert_active": 9}, "n_expert_active is 9, but there are 8 experts"),
        ("olmoe", {"bias": "all"}, "model.bias is 'all', but experts have no biases"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(family: Any, changes: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=sentence) as refused:
        ModelConfig(family, **changes)
    assert "\n" not in str(refused.value)


def test_experts_left_out_are_mixtrals():
    shape = ModelConfig("mixtral").resolved()
    assert (shape.n_expert, shape.n_expert_active) == (8, 2)
    assert ModelConfig("mixtral", n_expert=1).resolved().n_expert_active == 1
    assert shape.normalized() == ModelConfig("mixtral")


def test_the_looped_product_works_without_memory():
    with torch.device("meta"):
        y = looped_product(torch.zeros(6, 8), torch.zeros(2, 4, 8), torch.zeros(2, dtype=torch.int32))
    assert y.shape == (6, 4)
