"""The training loop: the only one, for every method, device and number of processes."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regpt.data.loader import StepBatches
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.train.config import TrainConfig
from regpt.train.guard import Guard, Verdict
from regpt.train.loss import LossSum, uncompiled, valid_targets
from regpt.train.loss_scale import LossScale
from regpt.train.memory import memory_advice
from regpt.train.metrics import flops_per_token, peak_memory_gib
from regpt.train.micro_batch import MicroBatch
from regpt.train.optim import set_lr
from regpt.train.peak import device_peak

Row = dict[str, object]
MOST_THREADS = 4096  # of a CPU, that a checkpoint may ask for


def whole(value: object, most: int) -> int:
    """`value`, a whole number from 1 to `most`; anything else is a ValueError."""
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{value!r} is no whole number from 1 to {most}")
    return value


def due(step: int, every: int) -> bool:
    """True when something done every `every` steps is to be done after `step`; 0 is never."""
    return every > 0 and step % every == 0


@dataclass(frozen=True)
class Actions:
    """What happens around the updates; handed in, so that training knows nothing of evaluation, files or terminals.

    Each takes the number of updates made so far; `log` takes the row of one update, or of an event. They run in every
    process.
    """

    log: Callable[[Row], None]
    validate: Callable[[int], None]
    sample: Callable[[int], None]
    save: Callable[[int], None]
    stop_requested: Callable[[], bool]
    examine: Callable[[], Row] = dict  # what there is to know of the present step's batch
    rewind: Callable[[], None] | None = None  # back to the last checkpoint, on with the batch after this one


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
        self.skipped = 0  # batches that no update was made with, since `loader` begins
        self.do: Actions | None = None  # `fit` sets it, and:
        self.report: Callable[[Row], None] = lambda row: None  # of events
        self.guard = Guard(config)
        self.micro_batch = MicroBatch(config.first_rows, mesh, self.go_on_with, pinned=config.deterministic)
        self.loss_scale = LossScale(
            dynamic=config.precision == "fp16",
            on_change=lambda scale, reason: self.event("loss_scale", loss_scale=scale, reason=reason),
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)  # here once; see clear_gradients
        self.flops_per_token = flops_per_token(model, loader.seq_len)
        self.peak_flops = device_peak(mesh.device, config.precision).flops

    def fit(self, do: Actions, every: Every) -> bool:
        """Train until `config.steps` updates are made; False when a stop was requested before that."""
        self.do, self.report = do, do.log
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

    @property
    def data_step(self) -> int:
        """The loader's step that the next update is made with."""
        return self.step + self.skipped

    def update(self) -> Row:
        """One update; its row of metrics, the loss taken before it over the whole global batch."""
        started = time.perf_counter()
        self.mesh.pulse.step = self.step + 1
        with memory_advice(f"with train.micro_batch_rows = {self.micro_batch.rows}", self.micro_batch.advice()):
            row = self.accepted()
            set_lr(self.optimizer, float(row["lr"]))  # type: ignore[arg-type]
            self.optimizer.step()
        self.step += 1
        self.loss_scale.note_update()
        self.guard.note_update(self.step, float(row["loss"]))  # type: ignore[arg-type]
        return row | self.costs(time.perf_counter() - started)

    def go_on_with(self, rows: int) -> None:
        """A process ran out of memory, and now all compute `rows` at once."""
        if uncompiled(self.loss_sum):
            torch.compiler.reset()  # forgets the graphs of the former shape, which count against torch's limit of eight
        self.event("out_of_memory", micro_batch_rows=rows)

    def accepted(self) -> Row:
        """Gradients that may be applied, of the first batch that gives such; the row of metrics so far."""
        while True:
            loss, norm = self.measured()
            while self.loss_scale.too_large(loss, norm):
                loss, norm = self.measured()
            row: Row = {"kind": "train", "step": self.step + 1, "loss": loss, "lr": self.lr_at(self.step + 1)}
            row["grad_norm"] = norm
            verdict = self.guard.judge(self.step, loss, norm)
            if verdict is None or not self.refused(row, verdict):
                return row

    def measured(self) -> tuple[float, float]:
        """Mean loss and norm of the gradients, which are there now; waits for the device, as nothing else in a step."""
        found = torch.stack(self.gradients())
        with self.mesh.pulse.waiting("the gradients of all processes"):
            loss, norm = found.tolist()
        return loss, norm

    def event(self, name: str, **facts: object) -> None:
        self.report({"kind": "event", "step": self.step, "name": name, **facts, "time": time.time()})

    def state(self) -> dict[str, object]:
        """What a run needs to go on, besides weights, moments and the number of the step: JSON values."""
        parts = {"loss_scale": self.loss_scale.state(), "guard": self.guard.state()}
        return {"micro_batch_rows": self.micro_batch.rows, "threads": torch.get_num_threads(), **parts}

    def load_state(self, state: Mapping[str, Any], *, rewound: bool = False) -> None:
        """Go on from what `state` gave; `rewound` as in `Guard.load_state`.

        Raises:
            UserError: it is not what `state` gives.
        """
        try:
            rows = whole(state.get("micro_batch_rows", self.micro_batch.rows), self.config.batch_tokens)
            if self.micro_batch.rows % rows == 0:  # else the configuration was changed since
                self.micro_batch.rows = rows
            if self.config.deterministic and self.mesh.device.type == "cpu":  # a sum is divided by their number
                torch.set_num_threads(whole(state.get("threads", torch.get_num_threads()), MOST_THREADS))
            self.loss_scale.load_state(state.get("loss_scale", {}))
            self.guard.load_state(state.get("guard", {}), rewound=rewound)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"the checkpoint's state of the trainer cannot be used ({error}); resume from another one"
            ) from None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over every valid target of the step, summed over micro-batches and processes.

        Each micro-loss is a sum, divided by the whole step's count *before* its backward: the result does not depend
        on how the batch is split, padded or masked. Returns the mean loss and the gradients' norm before clipping.
        """
        with self.mesh.pulse.working("reading its data"):
            own = valid_targets(self.loader.step(self.data_step, self.micro_batch.rows))
        dtype = self.parameters[0].dtype
        count = self.mesh.sum(torch.full((), own, device=self.mesh.device, dtype=dtype))  # there: nothing waits for it
        scale = self.loss_scale.scale
        total = self.micro_batch.attempt(lambda rows: self.accumulate(rows, count / scale))
        self.mesh.sum_gradients(self.parameters)
        self.loss_scale.unscale(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        return self.mesh.sum(total) / scale, norm

    def accumulate(self, rows: int, divisor: Tensor) -> Tensor:
        """This process's part of the loss and its gradients, in micro-batches of `rows`, each loss over `divisor`."""
        self.clear_gradients()
        total = torch.zeros_like(divisor)
        for batch in self.loader.step(self.data_step, rows):
            loss = self.loss_sum(batch.to(self.mesh.device)) / divisor
            loss.backward()
            total += loss.detach()
        return total

    def clear_gradients(self) -> None:
        """Set the gradients to zero where they lie: backward adds to them, and their memory stays the same."""
        self.optimizer.zero_grad(set_to_none=False)

    def refused(self, row: Row, verdict: Verdict) -> bool:
        """Record what is wrong with the step, and leave its batch out; False when it is to be applied all the same.

        Loss and norm are global: all processes come here.

        Raises:
            UserError: the policy is to stop.
        """
        own = valid_targets(self.loader.step(self.data_step, self.micro_batch.rows))
        if not self.mesh.total(torch.tensor(own)).item():
            raise UserError(f"step {row['step']}: no target carries loss; check the data and what masks its targets")
        facts: Row = {key: written(row[key]) for key in ("loss", "grad_norm", "lr")}
        facts |= {"at_step": row["step"], "policy": verdict.policy, "score": verdict.score}
        found = self.do.examine() if self.do is not None and not verdict.again else {}
        self.event(verdict.name, **facts, **found)
        if verdict.policy == "record":
            return False
        if verdict.policy == "stop":
            raise self.stopped(row, found)
        if verdict.policy == "skip":
            self.skipped += 1
        elif self.do is None or self.do.rewind is None:
            raise UserError(
                f"step {row['step']} cannot be rewound, there is no run folder; set train.on_non_finite skip"
            )
        else:
            self.do.rewind()
        return True

    def stopped(self, row: Row, found: Row) -> UserError:
        """Why the run ends."""
        again = self.guard.refused_in_row - 1
        before = f", after {again} more that were left out" if again else ""
        return UserError(
            f"step {row['step']}: the loss is {row['loss']} and the gradient norm {row['grad_norm']} at learning rate "
            f"{row['lr']}{before}{found.get('where', '')}, so the update was not applied; {self.advice(found)}"
        )

    def advice(self, found: Row) -> str:
        """What may help a run that ended, and was not done already."""
        if not found.get("repeats", True):
            return "suspect the hardware, and go on from the last checkpoint with --resume"
        changes = ["a lower --optim.lr", "more --optim.warmup-steps"] if self.step else []  # no update made the first
        changes += ["--train.precision fp32"] if self.config.precision not in ("fp32", "fp64") else []
        again = "go on from the last checkpoint with --train.on-non-finite skip"
        advice = [again] if self.config.on_non_finite == "stop" else []
        advice += [f"with --force or --fork-from, set {' or '.join(changes)}"] if changes else []
        return ", or, ".join(advice) or "check the data and what --init-from named"

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


def written(number: object) -> object:
    """JSON knows no NaN: `"nan"`, `"inf"`."""
    return number if not isinstance(number, float) or math.isfinite(number) else str(number)
