"""Optimizer groups by parameter name, and an optimizer's state as named tensors at the real vocabulary size."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UsageError, UserError
from regpt.model.transformer import Transformer
from regpt.model.weights import real_shape, unpadded
from regpt.train.adamw import AdamW, OffloadedAdamW
from regpt.train.config import OptimConfig, OptimGroup
from regpt.train.low_memory import STATE_DTYPES, LowMemoryAdamW
from regpt.train.rounding import RoundedUpdate

FUSED_DEVICES = ("cuda", "cpu")


def make_optimizer(
    model: Transformer, config: OptimConfig, device: torch.device, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer over every parameter that learns, its state allocated; each group has its `initial_lr`. `seed` is
    that of stochastic rounding, where weights or moments have fewer than 32 bits.

    AdamW (Loshchilov & Hutter 2019). What does not fit into memory is known here, before anything is computed.

    Raises:
        UsageError: a pattern of `optim.groups` that no parameter's name matches first.
        UserError: `optim.state_dtype` needs a package that is not installed.
    """
    learning: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    groups, rounds = (
        parameter_groups(model, config),
        any(p.dtype == torch.bfloat16 for p in learning) or config.state_dtype != "fp32",
    )
    fused = device.type in FUSED_DEVICES and not rounds
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": fused,
    }
    rule = RoundedUpdate(learning, seed, device) if rounds else None
    if config.offload:
        state_dtype = STATE_DTYPES[config.state_dtype] if rule else None
        optimizer = OffloadedAdamW(groups, state_dtype=state_dtype, rule=rule, **options)
    elif rule:
        optimizer = LowMemoryAdamW(groups, state_dtype=config.state_dtype, rule=rule, **options)
    else:
        optimizer = AdamW(groups, **options)
    optimizer.register_step_post_hook(lambda *_: count_as_changed([*learning]))
    return optimizer


def parameter_groups(model: Transformer, config: OptimConfig) -> list[dict[str, Any]]:
    """torch's parameter groups: each parameter in the first group whose pattern matches its name.

    The groups of `config`, then the model family's; what a group leaves out is `config`'s own value.
    """
    groups = [*config.groups, *(OptimGroup(**group) for group in model.default_groups())]
    members: list[list[Tensor]] = [[] for _ in groups]
    for name, p in model.named_parameters():
        if p.requires_grad:
            first = next(k for k, group in enumerate(groups) if fnmatchcase(name, group.pattern))
            members[first].append(p)
    for group, own in zip(config.groups, members):
        if not own:
            raise UsageError(
                f"optim.groups has the pattern {group.pattern!r}, which is the first match of no parameter; "
                f"names are such as {next(name for name, _ in model.named_parameters())!r} (regpt inspect MODEL)"
            )
    merged: dict[tuple[tuple[str, Any], ...], list[Tensor]] = {}
    for group, own in zip(groups, members):
        merged.setdefault(tuple(torch_options(group, config).items()), []).extend(own)
    return [{"params": own, **dict(options)} for options, own in merged.items() if own]


def torch_options(group: OptimGroup, config: OptimConfig) -> dict[str, Any]:
    """torch's options of a group, without its parameters."""
    lr = config.lr * group.lr_scale
    betas = (config.beta1 if group.beta1 is None else group.beta1, config.beta2 if group.beta2 is None else group.beta2)
    decay = config.weight_decay if group.weight_decay is None else group.weight_decay
    return {"lr": lr, "initial_lr": lr, "betas": betas, "weight_decay": decay}


def count_as_changed(parameters: Sequence[Tensor]) -> None:
    """Raise the parameters' versions, by which copies are renewed: torch's fused optimizers do not."""
    torch.autograd.graph.increment_version(parameters)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def named_state(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Parameter, name and tensor of the state of every parameter that learns, whatever the optimizer keeps."""
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items() if p.requires_grad else ():
            if isinstance(value, Tensor):
                yield name, key, value


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<name>/<parameter>` of every tensor of the state but the counters of updates; views without padding rows."""
    of_state = named_state(model, optimizer)
    return {f"{key}/{name}": unpadded(model, name, value) for name, key, value in of_state if key != "step"}


@torch.no_grad()
def load_optimizer(
    model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int
) -> None:
    """Restore what `optimizer_tensors` gave after `step` updates; before the first, an empty state.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    for name, key, value in named_state(model, optimizer):
        if key == "step":
            value.fill_(step)
        elif step == 0:
            value.zero_()
        else:
            of_name, shape = f"{key}/{name}", real_shape(model, name, value)
            if of_name not in tensors or tuple(tensors[of_name].shape) != shape:
                raise UserError(
                    f"the optimizer state lacks {of_name!r} of shape {shape}; resume from another checkpoint"
                )
            if (found := tensors[of_name]).is_floating_point() != value.is_floating_point():
                raise UserError(
                    f"{of_name!r} is stored as {found.dtype}, optim.state_dtype asks for {value.dtype}, and moments in "
                    "8 bits are only resumed as such; set optim.state_dtype as it was"
                )
            unpadded(model, name, value).copy_(found)
