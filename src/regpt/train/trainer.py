"""The training loop, shared by every method, device and world size."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from regpt.data.batch import Batch
from regpt.data.loader import StepBatches
from regpt.errors import UserError
from regpt.model.head import wide
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.train.backend import Backend
from regpt.train.balance import COUNTS, Balance
from regpt.train.config import TrainConfig
from regpt.train.guard import Guard, Verdict
from regpt.train.loss_scale import LossScale
from regpt.train.memory import memory_advice, peak_memory_gib
from regpt.train.micro_batch import MicroBatch
from regpt.train.objective import LARGEST, Objective
from regpt.train.optim import set_lr
from regpt.train.peak import device_peak, flops_per_token

Row = dict[str, object]
UNCLIPPED = 0.9999  # a norm below this share of train.grad_clip is left: torch would multiply by 1
MOST_THREADS = 4096  # of a CPU, that a checkpoint may ask for
LARGEST_COUNT = 2**100  # tokens or FLOPs, beyond any run


def whole(value: object, most: int, least: int = 1) -> int:
    """`value`, a whole number from `least` to `most`; anything else is a ValueError."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def due(step: int, every: int) -> bool:
    """Return True if an action with interval `every` runs after `step`; interval 0 never runs."""
    return every > 0 and step % every == 0


class Actions(Protocol):
    """Callbacks around the updates, passed in so that the trainer imports no evaluation, file or terminal code.

    `step` is the number of updates made so far. Every rank calls every action.
    """

    def log(self, row: Row) -> None:
        """Record the row of one update, or of an event."""

    def validate(self, step: int) -> None: ...

    def sample(self, step: int) -> None: ...

    def save(self, step: int) -> None: ...

    def stop_requested(self) -> bool: ...

    def examine(self) -> Row:
        """Diagnose the current batch after a verdict on its gradients: facts for the event row."""
        ...

    def rewind(self) -> None:
        """Restore the last checkpoint; continue with the batch after the current one."""


@dataclass(frozen=True)
class StepResult:
    """One attempt at an update.

    Attributes:
        step: number of the update, from 1.
        loss: mean over the units of the global batch, before the update.
        grad_norm: before clipping.
        lr: learning rate of the update.
        extras: further means of the objective, by name.
        verdict: why the update was not applied; None when it was.
        found: diagnosis of the batch, from `Actions.examine`.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    extras: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    found: Row = field(default_factory=dict)


class Trainer:
    """Updates a model step by step; `step` counts the updates made.

    Args:
        model: on its device, with its weights.
        objective: counts the units (targets, pairs, …) that the loss of a step is averaged over.
        backend: computes the gradients of the objective.
        optimizer: over the model's parameters; each group has its `initial_lr`.
        schedule: multiplier of the learning rates in the k-th update, k from 1.
        loader: micro-batches of this process for each step.
        mesh: the processes of this run.
        config: the `[train]` section.
        step: updates made before, in a resumed run.
        balance: of the objective, where the model has experts.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        loader: StepBatches,
        mesh: Mesh,
        config: TrainConfig,
        *,
        step: int = 0,
        balance: Balance | None = None,
    ):
        self.balance = balance
        self.model, self.objective, self.backend = model, objective, backend
        self.optimizer, self.schedule = optimizer, schedule
        self.loader, self.mesh, self.config, self.step = loader, mesh, config, step
        self.skipped = 0  # batches without an update since the loader's first row
        self.do: Actions | None = None  # `fit` sets it
        self.guard = Guard(config)
        self.micro_batch = MicroBatch(config.first_rows, mesh, self.note_fewer_rows, pinned=config.deterministic)
        self.loss_scale = LossScale(
            dynamic=config.precision == "fp16",
            on_change=lambda scale, reason: self.event("loss_scale", loss_scale=scale, reason=reason),
        )
        self.stage = (config.batch_tokens, loader.seq_len)  # of the last step
        self.flops_per_token = flops_per_token(model, loader.seq_len)
        self.tokens = step * config.batch_tokens  # of the updates made
        self.flops = self.tokens * self.flops_per_token
        self.peak_flops = device_peak(mesh.device, config.precision).flops

    def fit(self, do: Actions, *, validate_every: int = 0, sample_every: int = 0, save_every: int = 0) -> bool:
        """Train until `config.steps` updates are made; return False if a stop was requested before that.

        Validates, samples and saves at the given intervals and after the last step (interval 0: only then).
        """
        self.do, every = do, {"validate": validate_every, "sample": sample_every}
        self.evaluate(every)  # at step 0; after a resume, the evaluation that a stop may have pre-empted
        while self.step < self.config.steps:
            started = time.perf_counter()
            while (result := self.train_step()).verdict is not None:
                self.apply_verdict(result)
            do.log(self.row(result, time.perf_counter() - started))
            last = self.step == self.config.steps
            if not last and self.mesh.any(do.stop_requested()):
                do.save(self.step)
                return False
            if last or due(self.step, save_every):
                do.save(self.step)  # before evaluating, so that a failed evaluation loses no updates
            self.evaluate(every)
        return True

    def train_step(self) -> StepResult:
        """Make one update with the next global batch, unless its loss or gradients are refused.

        Synchronises with the device once, to read the loss and the norm.
        """
        self.mesh.pulse.step = self.step + 1
        with memory_advice(f"with train.micro_batch_rows = {self.micro_batch.rows}", self.micro_batch.advice()):
            loss, norm, extras = self.gradients()
            factor = self.schedule(self.step + 1)
            result = StepResult(self.step + 1, loss, norm, self.optimizer.defaults["lr"] * factor, extras)
            if (verdict := self.judge(result)) is not None:
                result = replace(result, verdict=verdict, found=self.log_verdict(result, verdict))
                if verdict.policy != "record":
                    return result
            set_lr(self.optimizer, factor)
            self.optimizer.step()
        self.step += 1
        self.tokens += self.stage[0]
        self.flops += self.stage[0] * self.flops_per_token
        if self.balance is not None:
            self.balance.note_update()
        self.loss_scale.note_update()
        self.guard.note_update(self.step, loss)
        return replace(result, verdict=None)

    def gradients(self) -> tuple[float, float, dict[str, float]]:
        """Set the gradients to those of the mean loss over all units of the step, on all micro-batches and ranks.

        Each micro-loss is a sum, divided by the whole step's count *before* its backward: the result does not depend
        on how the batch is split, padded or masked. Returns the mean loss, the norm before clipping, and the extras.
        """
        with self.mesh.pulse.working("reading its data"):
            batches = self.loader.step(self.data_step, self.micro_batch.rows)
            units = self.objective.units(batches)
        self.note_stage(batches)
        dtype, device = wide(self.backend.parameters[0].dtype), self.mesh.device
        units = self.mesh.sum(torch.full((), units, device=device, dtype=dtype))  # does not synchronise
        scale = self.loss_scale.scale
        loss, extras = units, {}  # overwritten by the first attempt that fits into memory
        for attempt in self.micro_batch.attempts():
            with attempt:
                batches = self.loader.step(self.data_step, self.micro_batch.rows)
                loss, extras = self.backend.forward_backward(batches, units / scale)
        length = self.backend.sum_gradients(scale)
        counts = extras.pop(COUNTS, None)
        sums = [self.mesh.sum(loss) / scale]
        for name, value in extras.items():
            sums.append(self.mesh.largest(value) if name.startswith(LARGEST) else self.mesh.sum(value) / scale)
        with self.mesh.pulse.waiting("the gradients of all processes"):
            mean, norm, *further = torch.stack([sums[0], length, *sums[1:]]).tolist()  # synchronises
        if self.config.grad_clip and not norm < UNCLIPPED * self.config.grad_clip - 1e-6:
            self.backend.clip(self.config.grad_clip, length)
        if self.balance is not None and counts is not None:
            self.balance.take(self.mesh.sum(counts))
        return mean, norm, dict(zip(extras, further))

    @property
    def data_step(self) -> int:
        """Step of the loader that the next update reads: skipped batches count, too."""
        return self.step + self.skipped

    def judge(self, result: StepResult) -> Verdict | None:
        """Return a verdict on suspicious gradients, or None. Its inputs are global, so all ranks agree."""
        if self.loss_scale.backs_off(result.loss, result.grad_norm):
            return Verdict("overflow", "repeat")
        return self.guard.judge(self.step, result.loss, result.grad_norm)

    def note_stage(self, batches: Sequence[Batch]) -> None:
        """Follow `train.batch_ramp` to the batch and row length of this step."""
        if not self.config.batch_ramp:
            return
        (rows, seq_len), before = batches[0].idx.shape, self.stage
        self.stage = (len(batches) * rows * self.mesh.world_size * seq_len, seq_len)
        if self.stage == before:
            return
        self.flops_per_token = flops_per_token(self.model, seq_len)
        self.forget_graphs()
        self.event("batch_ramp", at_step=self.step + 1, batch_tokens=self.stage[0], seq_len=seq_len)

    def forget_graphs(self) -> None:
        """Drop compiled graphs of former shapes, which count against torch's limit of eight."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def note_fewer_rows(self, rows: int) -> None:
        """Log that a rank ran out of memory and that all ranks now use micro-batches of `rows` rows."""
        self.forget_graphs()
        self.event("out_of_memory", micro_batch_rows=rows)

    def evaluate(self, every: Mapping[str, int]) -> None:
        """Validate and sample if it is time, or the end."""
        assert self.do is not None
        last = self.step == self.config.steps
        if last or due(self.step, every["validate"]):
            self.do.validate(self.step)
        if last or due(self.step, every["sample"]):
            self.do.sample(self.step)

    def event(self, name: str, **facts: object) -> None:
        if self.do is not None:
            self.do.log({"kind": "event", "step": self.step, "name": name, **facts, "time": time.time()})

    def state(self) -> dict[str, object]:
        """State for a resume, apart from weights, moments and step number, as JSON values."""
        parts = {"loss_scale": self.loss_scale.state(), "guard": self.guard.state()}
        parts |= {} if self.balance is None else {"balance": self.balance.state()}
        counts = {"tokens": self.tokens, "flops": self.flops}
        return {"micro_batch_rows": self.micro_batch.rows, "threads": torch.get_num_threads(), **counts, **parts}

    def load_state(self, state: Mapping[str, Any], *, rewound: bool = False) -> None:
        """Restore what `state` returned; `rewound` as in `Guard.load_state`.

        Raises:
            UserError: `state` does not have the form that `Trainer.state` returns.
        """
        try:
            rows = whole(state.get("micro_batch_rows", self.micro_batch.rows), self.config.batch_tokens)
            if self.micro_batch.rows % rows == 0:  # otherwise the configured rows changed since the save
                self.micro_batch.rows = rows
            if self.config.deterministic and self.mesh.device.type == "cpu":  # sums are split by thread
                torch.set_num_threads(whole(state.get("threads", torch.get_num_threads()), MOST_THREADS))
            self.tokens = whole(state.get("tokens", self.tokens), LARGEST_COUNT, least=0)
            self.flops = whole(state.get("flops", self.flops), LARGEST_COUNT, least=0)
            if self.balance is not None:
                self.balance.load_state(state.get("balance", {}))
            self.loss_scale.load_state(state.get("loss_scale", {}))
            self.guard.load_state(state.get("guard", {}), rewound=rewound)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"the checkpoint's state of the trainer cannot be used ({error}); resume from another one"
            ) from None

    def log_verdict(self, result: StepResult, verdict: Verdict) -> Row:
        """Log a verdict as an event; return the diagnosis of its batch.

        Collective: loss and norm are global, so every rank calls this.

        Raises:
            UserError: no target of the step is valid.
        """
        if verdict.policy == "repeat":  # logged by the loss scale
            return {}
        own = self.objective.units(self.loader.step(self.data_step, self.micro_batch.rows))
        if not self.mesh.total(torch.tensor(own)).item():
            raise UserError(f"step {result.step}: no target carries loss; check the data and what masks its targets")
        found = self.do.examine() if self.do is not None and not verdict.again else {}
        numbers = {"loss": json_number(result.loss), "grad_norm": json_number(result.grad_norm), "lr": result.lr}
        facts = {"at_step": result.step, "policy": verdict.policy, "score": verdict.score}
        self.event(verdict.name, **numbers, **facts, **found)
        return found

    def apply_verdict(self, result: StepResult) -> None:
        """Skip, repeat or rewind after a refused update, by the policy of its verdict.

        Raises:
            UserError: the policy is to stop.
        """
        policy = result.verdict.policy if result.verdict else "repeat"
        if policy == "stop":
            raise self.stopped(result)
        if policy == "skip":
            self.skipped += 1
        if policy == "rewind":
            assert self.do is not None
            self.do.rewind()

    def stopped(self, result: StepResult) -> UserError:
        """Build the error that ends the run."""
        again = self.guard.refused_in_row - 1
        before = f", after {again} more skipped batches" if again else ""
        return UserError(
            f"step {result.step}: the loss is {result.loss} and the gradient norm {result.grad_norm} at learning rate "
            f"{result.lr}{before}{result.found.get('where', '')}, so the update was not applied; "
            f"{self.advice(result.found)}"
        )

    def advice(self, found: Row) -> str:
        """Suggest how to continue, omitting settings that the run has already."""
        if not found.get("repeats", True):
            return "suspect the hardware, and continue from the last checkpoint with --resume"
        # No update precedes the loss of step 1, so neither the learning rate nor the warm-up can explain it.
        changes = ["a lower --optim.lr", "more --optim.warmup-steps"] if self.step else []
        changes += ["--train.precision fp32"] if self.config.precision not in ("fp32", "fp64") else []
        again = "continue from the last checkpoint with --train.on-non-finite skip"
        advice = [again] if self.config.on_non_finite == "stop" else []
        advice += [f"with --force or --fork-from, set {' or '.join(changes)}"] if changes else []
        return ", or, ".join(advice) or "check the data and the model of --init-from"

    def row(self, result: StepResult, seconds: float) -> Row:
        """Row of metrics.jsonl for the update just made: its result, tokens, time, speed and memory."""
        tokens = self.stage[0]
        flops = tokens * self.flops_per_token
        return {
            "kind": "train",
            "step": result.step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            **result.extras,
            **({} if self.balance is None else self.balance.row()),
            "tokens": self.tokens,
            "dt_ms": seconds * 1e3,
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / (self.peak_flops * self.mesh.world_size),
            "flops": self.flops,
            "peak_memory_gib": peak_memory_gib(self.mesh.device),
            "time": time.time(),
        }


def json_number(number: object) -> object:
    """Spell non-finite floats as `"nan"`, `"inf"`, which JSON numbers cannot express."""
    return number if not isinstance(number, float) or math.isfinite(number) else str(number)
