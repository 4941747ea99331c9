"""Low-rank adapters (LoRA, Hu et al. 2021) on a frozen base: functions applied to a built model.

A module with an adapter keeps its place and its weight's name, and changes its class; its adapter's parameters are
`lora_A` (r, n_in), `lora_B` (n_out, r), and with DoRA `lora_magnitude` (n_out,). With B = 0 the model computes what it
did.
"""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regpt.errors import UsageError, UserError
from regpt.model.adapter_config import EMBEDDING, HEAD, AdapterConfig
from regpt.model.dropout import Dropout
from regpt.model.head import wide
from regpt.model.layers import Head, Linear
from regpt.model.quantize import FORMATS, QuantizedWeight, dequantize
from regpt.model.transformer import Transformer
from regpt.model.weights import is_adapter, named_generator, slots, unpadded

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
STORED = "stored"  # name of the module that holds a quantized weight
SHOWN = 6  # names in an error


class AdapterDropout:
    """Keys of the rows that are computed, for all adapters of a model; None without dropout."""

    def __init__(self, rate: float):
        self.rate, self.keys = rate, cast(Tensor | None, None)

    def __call__(self, x: Tensor, site: int) -> Tensor:
        return x if self.keys is None or not self.rate else Dropout(self.rate, self.keys)(x, site)


class AdaptedLinear(Linear):
    """y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ; the frozen W as it is, or quantized. Without an adapter (`scale` 0) its base
    alone."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    stored: QuantizedWeight | None
    scale: float
    site: int
    dropout: AdapterDropout

    def base(self, x: Tensor) -> Tensor:
        if self.stored is not None:
            return self.stored.product(x, self.bias)
        return self.ops.linear(x, self.weight, self.bias)

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) if self.stored is None else self.stored.dequantized(dtype)

    def forward(self, input: Tensor) -> Tensor:
        y = self.base(input)  # (..., n_out)
        if not self.scale:
            return y
        x = self.dropout(input, self.site) if self.dropout.rate else input
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        delta = self.scale * F.linear(low, self.lora_B.to(low.dtype))  # (..., n_out)
        if self.lora_magnitude is None:
            return y + delta
        with torch.no_grad():  # a constant in the backward (Liu et al. 2024, section 4.3)
            weight = self.base_weight(self.lora_A.dtype) + self.scale * self.lora_B @ self.lora_A
            length = weight.norm(dim=1)
        gain = (self.lora_magnitude / length).to(y.dtype)  # (n_out,)
        base = y if self.bias is None else y - self.bias.to(y.dtype)
        return y + (gain - 1) * base + gain * delta  # exactly y where the gain is 1 and B is 0


class AdaptedTable(nn.Module):
    """An embedding or a head whose `weight` is W + s · B A, for all that read it."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    @property
    def weight(self) -> Tensor:  # instead of the parameter, which keeps the name
        frozen = self._parameters["weight"]
        assert frozen is not None
        delta = (self.scale * self.lora_B @ self.lora_A).to(frozen.dtype)  # (V, C)
        return frozen + F.pad(delta, (0, 0, 0, len(frozen) - len(delta)))


class AdaptedEmbedding(AdaptedTable, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows of the adapted table."""


class AdaptedHead(AdaptedTable, Head):
    """The adapted table as the output projection."""


def adapt(model: Transformer, config: AdapterConfig) -> Transformer:
    """Freeze `model` and give it the adapters of `config`, whose values `begin_adapters` or `load_adapters` sets; the
    base's values, where it is quantized, are to be loaded after this. Nothing without a rank.

    Raises:
        UsageError: targets that the model does not have, or a tied embedding without `tied`.
    """
    if not config.r:
        return model
    model.requires_grad_(False)
    model.adapter, model.adapter_dropout = config, AdapterDropout(config.dropout)
    linears, chosen = linears_of(model), chosen_targets(model, config)
    for site, (name, module) in enumerate(linears.items(), start=3 * model.config.n_layer + 4):
        if name in chosen or config.base != "none":
            adapt_linear(module, config, model, site, adapted=name in chosen)
    for word, name in tables_of(model).items():
        if word in config.targets:
            adapt_table(model.get_submodule(name), config, model)
    return model


def linears_of(model: Transformer) -> dict[str, Linear]:
    """The linear layers of the blocks by name; matrices of experts and their routers are none."""
    blocks = {id(module) for block in model.blocks for module in block.modules()}
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and id(m) in blocks}


def tables_of(model: Transformer) -> dict[str, str]:
    """`embedding` and `head` → module; one and the same where they are tied."""
    embedding = model.token_embedding.removesuffix(".weight")
    head = next((name for name, module in model.named_modules() if isinstance(module, Head)), embedding)
    return {EMBEDDING: embedding, HEAD: head}


def chosen_targets(model: Transformer, config: AdapterConfig) -> set[str]:
    """Names of the linear layers that `config.targets` match.

    Raises:
        UsageError: a pattern that matches nothing, or a tied table without `adapter.tied`.
    """
    names, tables, found = [*linears_of(model)], tables_of(model), set[str]()
    for pattern in config.targets:
        if pattern in tables:
            if tables[EMBEDDING] == tables[HEAD] and config.tied != "shared":
                raise UsageError(
                    f"adapter.targets has {pattern!r}, but embedding and head of this model are one matrix; set "
                    "--adapter.tied shared to adapt both at once, or leave it out"
                )
            continue
        matched = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[2], pattern)}
        if not matched:
            examples = list(dict.fromkeys([n.rpartition(".")[2] for n in names] + names[:1]))[: SHOWN + 2]
            raise UsageError(
                f"adapter.targets has {pattern!r}, which matches no linear layer of the blocks; names are such as "
                f"{', '.join(examples)}, besides embedding and head"
            )
        found |= matched
    if config.tied and not tables.keys() & set(config.targets):
        raise UsageError("adapter.tied is set, but adapter.targets names neither embedding nor head; leave it out")
    return found


def adapt_linear(module: Linear, config: AdapterConfig, model: Transformer, site: int, *, adapted: bool) -> None:
    n_out, n_in, weight = module.out_features, module.in_features, module.weight
    module.__class__ = AdaptedLinear
    own = cast(AdaptedLinear, module)
    own.scale, own.site, own.lora_magnitude, own.dropout = 0.0, site, None, model.adapter_dropout
    own.register_module(STORED, None)
    if config.base != "none":
        del own.weight
        own.register_parameter("weight", None)
        own.stored = QuantizedWeight(config.base, n_out, n_in).to(weight.device)
    if adapted:
        options: dict[str, Any] = {"dtype": wide(weight.dtype), "device": weight.device}
        own.scale = config.scale
        own.lora_A = nn.Parameter(torch.empty(config.r, n_in, **options))
        own.lora_B = nn.Parameter(torch.zeros(n_out, config.r, **options))
        own.lora_magnitude = nn.Parameter(torch.ones(n_out, **options)) if config.dora else None


def adapt_table(module: nn.Module, config: AdapterConfig, model: Transformer) -> None:
    weight = module.get_parameter("weight")
    cast(Any, module).__class__ = AdaptedEmbedding if isinstance(module, nn.Embedding) else AdaptedHead
    adapted = cast(AdaptedTable, module)
    options: dict[str, Any] = {"dtype": wide(weight.dtype), "device": weight.device}
    adapted.scale = config.scale
    adapted.lora_A = nn.Parameter(torch.empty(config.r, weight.size(1), **options))
    adapted.lora_B = nn.Parameter(torch.zeros(model.config.vocab_size, config.r, **options))


@torch.no_grad()
def begin_adapters(model: Transformer, seed: int) -> None:
    """B = 0, A uniform within ±1/√n_in (as in peft: Kaiming's with a = √5), each from a generator of its own;
    magnitudes are the lengths of the base's rows."""
    for name, p in adapter_parameters(model).items():
        module, _, kind = name.rpartition(".")
        if kind == A:
            values = torch.empty(p.shape, device="cpu").uniform_(-1, 1, generator=named_generator(seed, name))
            p.copy_(values / math.sqrt(p.size(1)))
        elif kind == B:
            p.zero_()
        else:
            p.copy_(cast(AdaptedLinear, model.get_submodule(module)).base_weight(p.dtype).norm(dim=1))


def adapter_parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


@torch.no_grad()
def load_adapters(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapters `tensors` into `model`.

    Raises:
        UserError: one is missing, unknown or of another shape.
    """
    own = adapter_parameters(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "lack" if name in own else "have the unknown tensor"
        raise UserError(f"the adapters {what} {name!r}; give the settings of [adapter] that they were trained with")
    for name, p in own.items():
        if tensors[name].shape != p.shape:
            raise UserError(
                f"adapter {name!r} has shape {tuple(tensors[name].shape)}, this model needs {tuple(p.shape)}; give the "
                "base and the settings of [adapter] that it was trained with"
            )
        p.copy_(tensors[name])


def base_tensors(model: Transformer) -> dict[str, Tensor]:
    """Everything frozen of an adapted model by name, at its real shape: views; of quantized weights their pieces."""
    frozen = {name: p for name, p in model.named_parameters() if not is_adapter(name)}
    return {name: unpadded(model, name, p.detach()) for name, p in frozen.items()} | dict(model.named_buffers())


@torch.no_grad()
def load_base(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `base_tensors` gave into `model`; padding rows become zero.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        if is_adapter(name):
            continue
        real = unpadded(model, name, tensor)
        if name not in tensors or tensors[name].shape != real.shape:
            raise UserError(f"the base lacks {name!r} of shape {tuple(real.shape)}; restore the folder of the base")
        real.copy_(tensors[name])
        if name in model.padded_names:
            tensor[len(real) :] = 0


@torch.no_grad()
def quantization_error(model: Transformer, weights: Mapping[str, Tensor]) -> float:
    """Length of the difference between `weights` and what the quantized layers of `model` hold of them, over theirs."""
    lost, whole = 0.0, 0.0
    for name, slot in slots(model).items():
        if isinstance(slot, QuantizedWeight):
            held = slot.dequantized(torch.float32)
            lost += (held - weights[name].to(held)).square().sum().item()
            whole += weights[name].float().square().sum().item()
    return math.sqrt(lost / whole) if whole else 0.0


class Merged(Mapping[str, Tensor]):
    """The weights of the plain model that a base and its adapters amount to, each computed when it is asked for; in
    float32 at least, as a merge in fewer bits is another model.

    Args:
        shapes: of the plain model's weights.
        base: as `base_tensors` or `state_tensors` gives it.
        adapters: as `adapter_parameters` does.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        base: Mapping[str, Tensor],
        adapters: Mapping[str, Tensor],
        config: AdapterConfig,
    ):
        self.shapes, self.base, self.adapters, self.config = shapes, base, adapters, config

    def __getitem__(self, name: str) -> Tensor:
        module, weight = name.rpartition(".")[0], self.of_base(name)
        if not name.endswith(".weight") or f"{module}.{A}" not in self.adapters:
            return weight
        found = {kind: self.adapters[f"{module}.{kind}"] for kind in (A, B)}
        return merged(weight, found[A], found[B], self.config.scale, self.adapters.get(f"{module}.{MAGNITUDE}"))

    def of_base(self, name: str) -> Tensor:
        if name in self.base:
            tensor = self.base[name]
            return tensor.to(wide(tensor.dtype))
        stored = f"{name.removesuffix('weight')}{STORED}"
        shape = self.shapes[name]
        pieces = {piece: self.base[f"{stored}.{piece}"] for piece in FORMATS[self.config.base].sizes(*shape)}
        return dequantize(self.config.base, pieces, shape[0], shape[1], torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W + s · B A (n_out, n_in); with a magnitude, rows of that length."""
    whole = weight + (scale * b @ a).to(weight.dtype)
    return whole if magnitude is None else whole * (magnitude / whole.norm(dim=1))[:, None].to(weight.dtype)


def unmerged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W of a `merged` weight without a magnitude, up to rounding."""
    return weight - (scale * b @ a).to(weight.dtype)


def adapter_summary(model: Transformer) -> dict[str, Any]:
    """Names of what is adapted, and how many parameters are trained."""
    own = adapter_parameters(model)
    names = [name.removesuffix(f".{A}") for name in own if name.endswith(A)]
    return {"adapted": names, "trained": sum(p.numel() for p in own.values())}
