"""Even loads of experts: a loss or a bias that spreads tokens over them, the router's z-loss, and the loads themselves.

With p_te the router's probability of expert e for token t, E experts and f_e their shares of the assignments:

    balance_loss · E · Σ_e f_e · mean_t p_te          Fedus et al. 2022, eq. 4; Jiang et al. 2024
    router_z_loss · mean_t (log Σ_e exp(logit_te))²    Zoph et al. 2022, eq. 5

both averaged over layers, over the valid targets of the whole step. f is that of the *last* update (even before the
first), so that the gradient is a plain sum over tokens: it does not depend on how a batch is split or padded. Of the
present step, f would be known only after all of its forwards. Loads of the present step are counted as integers over
micro-batches and ranks, exactly.

A bias (Wang et al. 2024; DeepSeek-AI 2024, section 2.1.2) moves after each update by ±`balance_rate`, towards an even
load, instead of the balance loss.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UsageError
from regpt.model.experts import LlamaOfExperts
from regpt.model.grouped import Routing
from regpt.model.transformer import Transformer
from regpt.train.config import TrainConfig

COUNTS = "expert_counts"  # of the objective's sums: (n_layer, n_expert) integers


class Balance:
    """Counts the loads of a model's experts, and evens them out by a loss or a bias.

    Attributes:
        shares: (n_layer, n_expert), of the assignments of the last update.
        counts: (n_layer, n_expert) int64, of the step whose gradients were last computed, over all ranks.
    """

    def __init__(self, model: LlamaOfExperts, config: TrainConfig):
        self.routers, self.rate = model.routers, config.balance_rate
        self.by_bias, self.z_loss = config.balance == "bias", config.router_z_loss
        self.balance_loss = 0.0 if self.by_bias else config.balance_loss
        E, device = self.routers[0].weight.size(0), model.device
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.shares = torch.full((len(self.routers), E), 1 / E, device=device, dtype=dtype)
        self.counts = torch.zeros(len(self.routers), E, device=device, dtype=torch.int64)
        self.applied, self.loads = (
            self.counts.clone(),
            self.counts.cpu(),
        )  # counts of the last update; `counts` on the host

    def sums(self, routes: list[Routing], valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses' sum over the `valid` (N,) of a micro-batch's tokens, and what is logged."""
        L, E = self.shares.shape
        numbers = torch.arange(E, device=valid.device)
        counts = [((one.chosen[..., None] == numbers) & valid[:, None, None]).sum((0, 1)) for one in routes]
        balance = squares = self.shares.new_zeros(())
        for share, routing in zip(self.shares, routes):
            if self.balance_loss:
                p = routing.logits.softmax(-1).masked_fill(~valid[:, None], 0).sum(0)  # (E,)
                balance = balance + E * (share * p).sum()
            if self.z_loss:
                squares = squares + routing.logits.logsumexp(-1).masked_fill(~valid, 0).square().sum()
        balance, squares = self.balance_loss / L * balance, self.z_loss / L * squares
        logged = {"balance_loss": balance.detach()} if self.balance_loss else {}
        logged |= {"router_z_loss": squares.detach()} if self.z_loss else {}
        return balance + squares, logged | {COUNTS: torch.stack(counts)}

    @torch.no_grad()
    def note_update(self) -> None:
        """Set the shares for the next update from `counts`, and move the biases."""
        self.applied = self.counts
        total = self.counts.sum(1, keepdim=True)  # (L, 1)
        self.shares.copy_(self.shares_of(self.counts))
        if self.by_bias:
            for router, count, n in zip(self.routers, self.counts, total):
                assert router.bias is not None
                # The sign is that of whole numbers: exact.
                router.bias.add_(torch.sign(n - len(count) * count).to(router.bias), alpha=self.rate)

    def take(self, counts: Tensor) -> None:
        """Record the `counts` of a step over all ranks; waits for the device."""
        self.counts, self.loads = counts, counts.cpu()

    def row(self) -> dict[str, object]:
        """Loads of `counts` by layer, for metrics.jsonl: the largest over the mean; entropy over that of even loads."""
        loads = self.loads.double()
        if not loads.any():  # another objective
            return {}
        shares = loads / loads.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(shares, shares).sum(1) / math.log(max(2, loads.size(1)))
        return {
            "expert_load": (loads.amax(1) / loads.mean(1)).tolist(),
            "expert_entropy": entropy.tolist() if loads.size(1) > 1 else [1.0] * len(loads),
        }

    def shares_of(self, counts: Tensor) -> Tensor:
        """Shares of the assignments (n_layer, n_expert); even where nothing was counted."""
        total = counts.sum(1, keepdim=True)
        return torch.where(total > 0, counts.to(self.shares) / total, 1 / counts.size(1))

    def state(self) -> dict[str, object]:
        return {"counts": self.applied.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; an empty mapping is the state before the first update.

        Raises:
            ValueError: loads of another shape, or negative ones.
        """
        L, E = self.shares.shape
        counts = state.get("counts", [[0] * E] * L)
        found = torch.tensor(counts, dtype=torch.int64)
        if found.shape != self.shares.shape or (found < 0).any():
            raise ValueError(f"{L} × {E} loads of experts are needed")
        self.applied = found.to(self.shares.device)
        self.shares.copy_(self.shares_of(self.applied))


KEYS = ("balance", "router_z_loss", "balance_loss", "balance_rate")


def make_balance(model: Transformer, config: TrainConfig) -> Balance | None:
    """None for a model without experts.

    Raises:
        UsageError: the configuration asks for a balance that the model does not have.
    """
    changed = [key for key in KEYS if getattr(config, key) not in (getattr(TrainConfig, key), 0)]
    if not isinstance(model, LlamaOfExperts):
        if changed:
            raise UsageError(
                f"train.{changed[0]} is for experts, but {model.config.family} has none; leave it out or choose "
                "another model.family"
            )
        return None
    if (config.balance == "bias") != model.config.expert_bias:
        raise UsageError(
            f"train.balance is {config.balance} and model.expert_bias {str(model.config.expert_bias).lower()}: a bias "
            "balances the experts that have one; set both or neither"
        )
    return Balance(model, config)
