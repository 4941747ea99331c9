"""The training loop: the only one, for every method, device and number of processes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regpt.data.batch import Batch
from regpt.data.loader import StepBatches
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.train.config import TrainConfig
from regpt.train.loss import LossSum, valid_targets
from regpt.train.metrics import flops_per_token, peak_memory_gib
from regpt.train.optim import set_lr
from regpt.train.peak import device_peak

Row = dict[str, object]


def due(step: int, every: int) -> bool:
    """True when something done every `every` steps is to be done after `step`; 0 is never."""
    return every > 0 and step % every == 0


@dataclass(frozen=True)
class Actions:
    """What happens around the updates; handed in, so that training knows nothing of evaluation, files or terminals.

    Each takes the number of updates made so far; `log` takes the row of one update. They run in every process.
    """

    log: Callable[[Row], None]
    validate: Callable[[int], None]
    sample: Callable[[int], None]
    save: Callable[[int], None]
    stop_requested: Callable[[], bool]


@dataclass(frozen=True)
class Every:
    """Steps between actions; 0 is only after the last update, when all of them happen."""

    validate: int
    sample: int
    save: int


class Trainer:
    """Updates a model step by step; `step` counts the updates made.

    Args:
        model: on its device, with its weights.
        loss_sum: summed loss of one micro-batch (`train.loss.make_loss_sum`), compiled or not.
        optimizer: over the model's parameters.
        lr_at: learning rate of the k-th update, k from 1.
        loader: micro-batches of this process for each step.
        mesh: the processes of this run.
        config: the `[train]` section.
        step: updates made before, when a run goes on.
    """

    def __init__(
        self,
        model: Transformer,
        loss_sum: LossSum,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], float],
        loader: StepBatches,
        mesh: Mesh,
        config: TrainConfig,
        *,
        step: int = 0,
    ):
        self.model, self.loss_sum, self.optimizer, self.lr_at = model, loss_sum, optimizer, lr_at
        self.loader, self.mesh, self.config, self.step = loader, mesh, config, step
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flops_per_token = flops_per_token(model.config, loader.seq_len)
        self.peak_flops = device_peak(mesh.device, config.precision).flops

    def fit(self, do: Actions, every: Every) -> bool:
        """Train until `config.steps` updates are made; False when a stop was requested before that."""
        self.evaluate(do, every)  # at initialisation; after a resume, what a stop may have left out
        while self.step < self.config.steps:
            do.log(self.update())
            last = self.step == self.config.steps
            if not last and self.mesh.any(do.stop_requested()):
                do.save(self.step)
                return False
            if last or due(self.step, every.save):
                do.save(self.step)  # first: a failure of what follows loses nothing
            self.evaluate(do, every)
        return True

    def evaluate(self, do: Actions, every: Every) -> None:
        """Validate and sample if it is time, or the end."""
        last = self.step == self.config.steps
        if last or due(self.step, every.validate):
            do.validate(self.step)
        if last or due(self.step, every.sample):
            do.sample(self.step)

    def update(self) -> Row:
        """One update; its row of metrics, the loss taken before it over the whole global batch."""
        started = time.perf_counter()
        with MemoryAdvice(self.config.micro_batch_rows):
            batches = self.loader.step(self.step)
            loss, norm = self.accumulate(batches)
            lr = self.lr_at(self.step + 1)
            row: Row = {"kind": "train", "step": self.step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm.item()}
            self.refuse_non_finite(row, batches)
            set_lr(self.optimizer, lr)
            self.optimizer.step()  # the first one allocates the optimizer's state
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return row | self.costs(time.perf_counter() - started)

    def accumulate(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over every valid target of the step, summed over micro-batches and processes.

        Each micro-loss is a sum, divided by the whole step's count *before* its backward: the result does not depend
        on how the batch is split, padded or masked. Returns the mean loss and the gradients' norm before clipping.
        """
        total = torch.zeros((), device=self.mesh.device, dtype=self.parameters[0].dtype)
        count = self.mesh.sum(torch.full_like(total, valid_targets(batches)))  # on the device: nothing waits for it
        for batch in batches:
            loss = self.loss_sum(batch.to(self.mesh.device)) / count
            loss.backward()
            total += loss.detach()
        self.mesh.sum_gradients(self.parameters)
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return self.mesh.sum(total), norm

    def refuse_non_finite(self, row: Row, batches: list[Batch]) -> None:
        """Stop before an update that would spoil the weights. Loss and norm are global: all processes come here."""
        loss, norm = row["loss"], row["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):  # type: ignore[arg-type]
            return
        if not self.mesh.sum(torch.tensor(valid_targets(batches), device=self.mesh.device)).item():
            raise UserError(f"step {row['step']}: no target carries loss; check the data and what masks its targets")
        raise UserError(
            f"step {row['step']}: the loss is {loss} and the gradient norm {norm} at learning rate {row['lr']}, "
            "so the update was not applied; resume from the last checkpoint with a lower optim.lr, more "
            "optim.warmup_steps, or precision fp32"
        )

    def costs(self, seconds: float) -> Row:
        """Tokens, time, speed and memory of the update just made."""
        tokens = self.config.batch_tokens
        flops = tokens * self.flops_per_token
        return {
            "tokens": self.step * tokens,
            "dt_ms": seconds * 1e3,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / (self.peak_flops * self.mesh.world_size),
            "flops": self.step * flops,
            "peak_memory_gib": peak_memory_gib(self.mesh.device),
            "time": time.time(),
        }


class MemoryAdvice:
    """A context that turns running out of memory into advice on what to try."""

    def __init__(self, rows: int):
        self.rows = rows

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if error is None or not exhausted:
            return
        fewer = max((n for n in range(1, self.rows // 2 + 1) if self.rows % n == 0), default=0)  # divides the batch too
        advice = (
            f"try --train.micro-batch-rows {fewer}, which computes the same update in smaller parts"
            if fewer
            else "micro_batch_rows is 1 already: use a smaller model, a shorter data.seq_len or another device"
        )
        raise UserError(f"out of memory with train.micro_batch_rows = {self.rows}; {advice}") from error
