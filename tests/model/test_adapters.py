"""Low-rank adapters: against the model without them, against merged weights, and their silent bugs."""

from dataclasses import replace

import pytest
import torch

from regpt.data.loader import dropout_keys
from regpt.errors import UsageError, UserError
from regpt.model.adapter_config import AdapterConfig
from regpt.model.adapters import (
    Merged,
    adapt,
    adapter_parameters,
    adapter_summary,
    base_tensors,
    begin_adapters,
    linears_of,
    load_adapters,
    load_base,
    merged,
    unmerged,
)
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import (
    InitialWeights,
    allocate,
    count_parameters,
    initialize,
    load_weights,
    state_tensors,
    without_memory,
)
from regpt.train.config import OptimConfig
from regpt.train.optim import make_optimizer
from regpt.train.peak import flops_per_token
from tiny import CONFIG, CPU, FAMILY_CONFIGS, build_model

LORA = AdapterConfig(r=4, alpha=8.0)
KINDS = {
    "lora": LORA,
    "rslora": replace(LORA, rslora=True),
    "dora": replace(LORA, dora=True),
    "some": replace(LORA, targets=("*_proj", "*c_fc", "*dense*")),
}
FAMILIES = {"gpt2 tied": CONFIG, **FAMILY_CONFIGS}
IDX = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(1))


def adapted(config: AdapterConfig, shape=CONFIG, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """A model with large weights, and adapters as they begin."""
    plain = build_model(config=shape, dtype=dtype)
    model = load_weights(adapt(make_model(shape).to(dtype), config), state_tensors(plain))
    begin_adapters(model, seed)
    return model


def trained(model: Transformer, size: float = 0.2) -> Transformer:
    """As after some training: every adapter has an effect."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * size)
    return model


def merged_model(model: Transformer, dtype: torch.dtype = torch.float64) -> Transformer:
    plain = make_model(model.config).to(dtype)
    assert model.adapter is not None
    shapes = InitialWeights(plain, 0).shapes
    return load_weights(plain, Merged(shapes, base_tensors(model), adapter_parameters(model), model.adapter))


# ---- B = 0, B ≠ 0 (bug 19: an adapter that is silently not applied) --------------------------------------------------


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_19_adapters_begin_as_the_base_bit_for_bit_and_change_it_once_trained(kind: str, shape):
    config = KINDS[kind] if kind != "some" or shape.family != "gpt2" else replace(LORA, targets=("c_proj", "*c_fc"))
    if kind == "some" and shape.family == "gpt_neox":
        config = replace(LORA, targets=("*dense*",))
    if kind == "some" and shape.family not in ("gpt2", "gpt_neox"):
        config = replace(LORA, targets=("*_proj",))
    plain, model = build_model(config=shape), adapted(config, shape)
    assert torch.equal(model(IDX), plain(IDX))
    assert (trained(model)(IDX) - plain(IDX)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_19_each_chosen_linear_layer_alone_changes_the_output(shape):
    base = build_model(config=shape)(IDX)
    for name in linears_of(build_model(config=shape)):
        model = trained(adapted(replace(LORA, targets=(name,)), shape))
        assert adapter_summary(model)["adapted"] == [name]
        assert not torch.equal(model(IDX), base), name


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_only_the_adapters_have_gradients_and_are_in_the_optimizer(shape):
    model = trained(adapted(KINDS["dora"], shape))
    model(IDX).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == set(adapter_parameters(model)) != set()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in learning)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1), CPU)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(learning)
    undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {id(p) for name, p in model.named_parameters() if name.endswith("magnitude")}


# ---- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_the_merged_model_computes_what_the_adapted_one_does(kind: str, shape):
    model = trained(adapted(KINDS[kind], shape))
    ours = model(IDX)
    assert (merged_model(model)(IDX) - ours).abs().max() <= 1e-12 * ours.abs().max()
    model = initialize(adapt(make_model(shape), KINDS[kind]), 3)  # weights as real ones are: float32 adds up well
    begin_adapters(model, 3)
    trained(model, 0.02)
    ours = model(IDX)
    assert (merged_model(model, torch.float32)(IDX) - ours).abs().max() <= 1e-6
    weight = torch.randn(24, 24)
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    assert (unmerged(merged(weight, a, b, 2.0), a, b, 2.0) - weight).abs().max() <= 1e-5


@pytest.mark.parametrize("base", ["nf4", "int8", "ternary"])
def test_10_a_quantized_base_is_merged_into_what_it_was_trained_on(base):
    """Bug 10: a merge into the weights before quantization is another model."""
    model = trained(adapted(replace(LORA, base=base), dtype=torch.float32))
    ours = model(IDX)
    assert (merged_model(model, torch.float32)(IDX) - ours).abs().max() <= 1e-5 * ours.abs().max()
    full = state_tensors(build_model(dtype=torch.float32))
    assert model.adapter is not None
    wrong = Merged(InitialWeights(make_model(CONFIG), 0).shapes, full, adapter_parameters(model), model.adapter)
    assert (load_weights(make_model(CONFIG), wrong)(IDX) - ours).abs().max() > 1e-3


# ---- embedding and head (bug 11) -------------------------------------------------------------------------------------


def test_11_a_tied_embedding_needs_an_explicit_choice_and_stays_tied():
    for target in ("embedding", "head"):
        with pytest.raises(UsageError, match="embedding and head of this model are one matrix"):
            adapt(make_model(CONFIG), replace(LORA, targets=("*", target)))
    model = trained(adapted(replace(LORA, targets=("head",), tied="shared"), dtype=torch.float32))
    assert adapter_summary(model)["adapted"] == ["wte"]
    assert torch.equal(model.head_weight, model.get_submodule("wte").weight)
    ours = model(IDX)
    assert (merged_model(model, torch.float32)(IDX) - ours).abs().max() <= 1e-6 * ours.abs().max()


def test_an_embedding_and_a_head_of_its_own_are_adapted_apart():
    shape = FAMILY_CONFIGS["qwen2"]
    base = build_model(config=shape)(IDX)
    for target, module in {"embedding": "embed_tokens", "head": "lm_head"}.items():
        model = adapted(replace(LORA, targets=(target,)), shape)
        assert torch.equal(model(IDX), base)
        assert adapter_summary(trained(model))["adapted"] == [module]
        ours = model(IDX)
        assert (ours - base).abs().max() > 1e-3
        assert (merged_model(model)(IDX) - ours).abs().max() <= 1e-12 * ours.abs().max()


# ---- dropout (bug 15) ------------------------------------------------------------------------------------------------


def test_15_dropout_of_adapters_is_keyed_and_off_without_keys():
    model = trained(adapted(replace(LORA, dropout=0.5)))
    plain = trained(adapted(LORA))
    keys = torch.from_numpy(dropout_keys(3, 0, 3).astype("int64"))
    assert torch.equal(model.train()(IDX), plain(IDX))  # training mode alone drops nothing
    dropped = model.hidden(IDX, dropout_keys=keys)
    assert (dropped - plain.hidden(IDX)).abs().max() > 1e-3
    assert torch.equal(model.hidden(IDX, dropout_keys=keys), dropped)
    assert torch.allclose(model.hidden(IDX[1:2], dropout_keys=keys[1:2]), dropped[1:2], atol=1e-12)
    assert torch.equal(model.hidden(IDX), plain.hidden(IDX))  # the keys of a training step are gone


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["none", "nf4", "int8", "ternary"])
def test_base_and_adapters_are_stored_apart_and_give_the_same_model(base):
    config = replace(LORA, base=base)
    model = trained(adapted(config, dtype=torch.float32))
    with without_memory():
        again = adapt(make_model(CONFIG), config)
    again = allocate(again, "cpu")
    load_base(again, base_tensors(model))
    load_adapters(again, adapter_parameters(model))
    assert torch.equal(again(IDX), model(IDX))
    assert not any("lora" in name for name in base_tensors(model))
    assert count_parameters(model) == count_parameters(make_model(CONFIG)) + adapter_summary(model)["trained"]


def test_random_weights_of_an_adapted_model_are_those_of_the_plain_one():
    model = initialize(adapt(make_model(CONFIG), LORA), 5)
    begin_adapters(model, 5)
    assert torch.equal(model(IDX), initialize(make_model(CONFIG), 5)(IDX))


def test_flops_count_no_gradient_of_frozen_weights():
    plain, model = make_model(CONFIG), adapt(make_model(CONFIG), LORA)
    frozen, own = plain.matmul_parameters(), adapter_summary(model)["trained"]
    assert model.matmul_parameters() == frozen
    assert flops_per_token(model, 16) == 4 * frozen + 6 * own + plain.attention_flops(16)


# ---- wrong values ----------------------------------------------------------------------------------------------------


WRONG = [
    (lambda: AdapterConfig(alpha=8.0), "adapter.alpha is 8.0, but adapter.r is 0"),
    (lambda: AdapterConfig(r=-1), "adapter.r is -1"),
    (lambda: AdapterConfig(r=4, dropout=1.0), "adapter.dropout is 1.0"),
    (lambda: AdapterConfig(r=4, targets=()), "names nothing to adapt"),
    (lambda: AdapterConfig(r=4, targets=("head",), dora=True), "adapter.dora is for linear layers"),
    (lambda: adapt(make_model(CONFIG), replace(LORA, targets=("q_prj",))), "'q_prj', which matches no linear layer"),
    (lambda: adapt(make_model(CONFIG), replace(LORA, tied="shared")), "adapter.tied is set, but"),
    (
        lambda: adapt(make_model(FAMILY_CONFIGS["olmoe"]), replace(LORA, targets=("*experts*",))),
        "matches no linear layer of the blocks; names are such as q_proj",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_adapter_is_refused_in_one_sentence(make, message: str):
    with pytest.raises(UsageError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_of_another_shape_are_refused_by_name():
    model = adapt(make_model(CONFIG), LORA)
    with pytest.raises(UserError, match="lora_A' has shape"):
        load_adapters(model, adapter_parameters(adapt(make_model(CONFIG), replace(LORA, r=2))))
    with pytest.raises(UserError, match="lack"):
        load_adapters(model, adapter_parameters(adapt(make_model(CONFIG), replace(LORA, targets=("c_fc",)))))
