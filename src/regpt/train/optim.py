"""The optimizer, and its state as named tensors at the real vocabulary size."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.model.weights import real_shape, unpadded
from regpt.train.adamw import AdamW
from regpt.train.config import OptimConfig
from regpt.train.offload import OffloadedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
FUSED_DEVICES = ("cuda", "cpu")


def make_optimizer(model: Transformer, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays only tensors of two or more dimensions: products and embeddings."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in FUSED_DEVICES
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": fused}
    if config.offload:
        optimizer = OffloadedAdamW(groups, device=device, **options)
    else:
        optimizer = AdamW(groups, **options)
        for p in learning:  # now, not in the first update: what does not fit is known before anything is computed
            # The fused step wants its counter beside the parameter, the plain one keeps it on the host.
            counter = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            optimizer.state[p] = {"step": counter} | {moment: torch.zeros_like(p) for moment in MOMENTS}
    optimizer.register_step_post_hook(lambda *_: count_as_changed(learning))
    return optimizer


def count_as_changed(parameters: Sequence[Tensor]) -> None:
    """Raise the parameters' versions, by which copies are renewed: torch's fused optimizers do not."""
    torch.autograd.graph.increment_version(parameters)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`exp_avg/<parameter>` and `exp_avg_sq/<parameter>` of every parameter that learns; views."""
    return {
        f"{moment}/{name}": unpadded(model, name, optimizer.state[p][moment])
        for name, p in model.named_parameters()
        if p.requires_grad
        for moment in MOMENTS
    }


@torch.no_grad()
def load_optimizer(
    model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int
) -> None:
    """Restore what `optimizer_tensors` gave after `step` updates.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    for name, p in model.named_parameters():
        if not p.requires_grad or step == 0:
            continue
        optimizer.state[p]["step"].fill_(step)
        for moment in MOMENTS:
            key, shape = f"{moment}/{name}", real_shape(model, name, p)
            if key not in tensors or tuple(tensors[key].shape) != shape:
                raise UserError(f"the optimizer state lacks {key!r} of shape {shape}; resume from another checkpoint")
            unpadded(model, name, optimizer.state[p][moment]).copy_(tensors[key])
