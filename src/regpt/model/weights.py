"""Weights into a model and out of it, always at the real vocabulary size, the tied head once."""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regpt.errors import UserError
from regpt.model.config import FAMILIES
from regpt.model.head import wide
from regpt.model.quantize import QuantizedWeight
from regpt.model.transformer import Transformer

REWARD = "reward_head.weight"
INIT_THREADS = min(16, os.cpu_count() or 1)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models made in this context have shapes only: their parameters are on the meta device."""
    with torch.device("meta"), WithoutValues():
        yield


def allocate(model: Transformer, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Give the parameters of a model made `without_memory` their memory on `device`; their values are not yet set."""
    for module in model.modules():  # Module.to_empty would import sympy, which takes seconds
        for name, p in module.named_parameters(recurse=False):
            kept = wide(dtype) if is_adapter(name) else dtype
            values = torch.empty(p.shape, device=device, dtype=kept)
            setattr(module, name, nn.Parameter(values, requires_grad=p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device=device))
    return model


class WithoutValues(TorchFunctionMode):
    """Modules keep their parameters as they were allocated: initial values on the meta device are unused, and torch
    imports its compiler for them, which takes seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def initialize(model: Transformer, seed: int) -> Transformer:
    """GPT-2's initialisation (Radford et al. 2019, section 2.3): N(0, 0.02), residual projections times (2·n_layer)^-½.

    Every parameter has its own generator on the CPU, seeded by `seed` and the parameter's name: the values do not
    depend on the model's device, on padding, or on how parameters are sharded over processes. Several are drawn at
    once, each by a thread of its own, and no more of them are in the host's memory than there are threads.
    """
    values = InitialWeights(model, seed)

    def fill(named: tuple[str, Slot]) -> None:
        name, parameter = named
        set_weight(model, name, parameter, values[name])

    with ThreadPoolExecutor(INIT_THREADS) as pool:  # normal_ is one thread's work, without the interpreter's lock
        list(pool.map(fill, slots(model).items()))
    return model


class InitialWeights(Mapping[str, Tensor]):
    """Name → initial value, float32 on the CPU, drawn when it is asked for."""

    def __init__(self, model: Transformer, seed: int):
        self.shapes = {name: real_shape(model, name, p) for name, p in slots(model).items()}
        self.model, self.seed = model, seed

    def __getitem__(self, name: str) -> Tensor:
        empty = torch.empty(self.shapes[name], dtype=torch.float32, device="cpu")
        if empty.dim() < 2:
            norm = 1.0 - FAMILIES[self.model.config.family].norm_offset
            return empty.fill_(0.0 if name.endswith(".bias") else norm)
        return empty.normal_(0.0, self.model.init_std(name), generator=named_generator(self.seed, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one purpose: its seed is the first 8 bytes of SHA-256(`seed/name`)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


Slot = Tensor | QuantizedWeight


def is_adapter(name: str) -> bool:
    """Whether `name` is of a parameter of an adapter (`model.adapters`), not of the model itself."""
    return name.rpartition(".")[2].startswith("lora_")


def slots(model: Transformer) -> dict[str, Slot]:
    """The places of the model's weights by name, those of its adapters left out."""
    own: dict[str, Slot] = {name: p for name, p in model.named_parameters() if not is_adapter(name)}
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    return own | {name.rpartition(".")[0] + ".weight": module for name, module in quantized.items()}


def real_shape(model: Transformer, name: str, parameter: Slot) -> tuple[int, ...]:
    """Shape without vocabulary padding."""
    padded = name in model.padded_names
    return (model.config.vocab_size, *parameter.shape[1:]) if padded else tuple(parameter.shape)


def unpadded(model: Transformer, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, shaped like parameter `name` (its gradient, its optimizer state), without the padding rows; a view."""
    return tensor[: model.config.vocab_size] if name in model.padded_names else tensor


def state_tensors(model: Transformer) -> dict[str, Tensor]:
    """Name → weight at its real shape, views of the model's own memory."""
    return {name: unpadded(model, name, p.detach()) for name, p in model.named_parameters()}


def grown_weights(model: Transformer, weights: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
    """`weights` with rows for the tokens that `model` has more.

    A new row is the mean of the others, so that its token is neither likely nor impossible (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models"), plus a tenth of their standard deviation in noise, by which
    new tokens differ from each other from the start. A head for rewards that they lack is zero: all answers are alike.
    """
    found = dict(weights)
    if model.reward_head is not None:
        found.setdefault(REWARD, torch.zeros(1, model.config.n_embd))
    for name in model.padded_names & weights.keys():
        old = weights[name]
        new = model.config.vocab_size - len(old)
        if new > 0:
            noise = torch.randn(new, *old.shape[1:], generator=named_generator(seed, f"grown/{name}"))
            rows = old.float().mean(0).cpu() + 0.1 * old.float().std(0).cpu() * noise
            found[name] = torch.cat([old, rows.to(old)])
    return found


@torch.no_grad()
def load_weights(model: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """Copy `weights`, named as in `state_tensors`, into the model; padding rows become zero.

    Raises:
        UserError: a name is missing or unknown, a shape differs, or a tensor holds no floating-point numbers.
    """
    own = slots(model)
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        what = f"lack {missing[0]!r}" if missing else f"have the unknown tensor {unknown[0]!r}"
        raise UserError(f"the weights {what}: {len(missing)} missing, {len(unknown)} unknown for this model's shape")
    for name, parameter in own.items():
        value, shape = weights[name], real_shape(model, name, parameter)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise UserError(
                f"weight {name!r} has shape {tuple(value.shape)} and type {value.dtype}, this model needs {shape} and "
                "floating-point numbers; build the model from the weights' own config"
            )
        set_weight(model, name, parameter, value)
    return model


@torch.no_grad()
def set_weight(model: Transformer, name: str, parameter: Slot, value: Tensor) -> None:
    if isinstance(parameter, QuantizedWeight):
        parameter.copy_(value)
        return
    # Through the parameter, not its `.data`: the kernels renew their copies when its version has changed.
    unpadded(model, name, parameter).copy_(value)
    parameter[len(value) :] = 0  # padding rows


def count_parameters(model: Transformer) -> int:
    """Number of parameters, padding left out, the tied head counted once."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    return adapters + sum(math.prod(real_shape(model, name, p)) for name, p in slots(model).items())
