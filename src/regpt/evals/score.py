"""Log-likelihoods of the endings of many prompts under a model, in packed batches.

Each context is computed once (`packing`), and logits only at positions that predict a scored token. The two compiled
functions see few shapes: hidden states of a batch, and log-probabilities at a fixed number of positions, which are
collected over batches.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.errors import UserError
from regpt.evals.packing import BatchPlan, PackedBatch, Prompt, Tree, bucketed, fill, packed, plant
from regpt.kernels.select import check_compiler, compile_for
from regpt.model.masks import AttentionMask
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh

# Tokens per batch, and positions per call of the head. Large products keep a GPU busy (logits of 4,096 positions take
# 0.8 GB in float32); small ones stay in the caches of a CPU.
BATCH_TOKENS = {"cuda": 32768, "mps": 4096, "cpu": 1024}
HEAD_ROWS = {"cuda": 4096, "mps": 512, "cpu": 512}
LOGITS = 2**28  # limit per call of the head, 1 GiB in float32: a large vocabulary gets fewer positions
SMALLEST_BATCH = 256  # tokens; the lower limit when batches shrink after an OOM
Progress = Callable[[int, int], None]  # called with the items done and their total


class Scores(NamedTuple):
    """Scores of every ending, in the order of the prompts.

    Attributes:
        log_likelihood: (endings,) float64, natural log of the probability of its scored tokens.
        tokens: (endings,) int64, number of scored tokens.
        greedy: (endings,) bool, True if every scored token was the argmax.
    """

    log_likelihood: np.ndarray
    tokens: np.ndarray
    greedy: np.ndarray


@dataclass
class Cost:
    """Seconds spent on compilation and tokens read, so far."""

    compile_seconds: float = 0.0
    tokens: int = 0


class Scorer:
    """Scores prompts under `model`; the ranks of `mesh` share the batches.

    Args:
        model: on the mesh's device. Do not modify it afterwards: compiled functions hold it.
        mesh: every rank passes the same prompts, and receives all scores.
        autocast: makes the context in which the model computes (`train.precision.autocast`).
        compile: compile hidden states and head, and pack rows of few lengths.
        batch_tokens: tokens computed at once; None chooses by the device.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        compile: bool = False,
        batch_tokens: int | None = None,
    ):
        kind = mesh.device.type
        self.model, self.mesh, self.autocast, self.compile = model, mesh, autocast, compile
        self.batch_tokens = batch_tokens or BATCH_TOKENS[kind]
        self.max_seq_len = model.config.max_seq_len
        self.head_rows = min(HEAD_ROWS[kind], max(1, LOGITS // len(model.head_weight)))
        self.cost = Cost()
        self.shapes: set[tuple[int, int]] = set()

        def hidden(idx: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
            with autocast():
                return model.hidden(idx, positions=positions, mask=AttentionMask(tree=ends))  # (B, T, C)

        def head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            with autocast():
                return log_probability(model.logits(hidden), targets)

        if compile:
            check_compiler(mesh.device)
        self.hidden = compile_for(model, hidden, dynamic=False) if compile else hidden
        self.head = compile_for(model, head, dynamic=False) if compile else head

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> Scores:
        """Score every ending of `prompts`. Collective.

        Out of memory halves `batch_tokens`, for later calls too.

        Raises:
            UserError: an ending longer than `max_seq_len`, a log-likelihood that is not finite, or too little memory.
        """
        trees = plant(prompts, self.max_seq_len)
        sizes = np.array([tree.size for tree in trees], dtype=np.int64)
        endings = sum(len(prompt.endings) for prompt in prompts)
        while (own := self.attempt(trees, sizes, endings, progress)) is None:
            if self.batch_tokens < 2 * SMALLEST_BATCH:
                raise UserError("out of memory; evaluate on a device with more memory, or on the CPU")
            self.batch_tokens //= 2
            self.shapes.clear()
        log_likelihood, tokens, hits = self.mesh.total(torch.from_numpy(own)).numpy()
        if not np.isfinite(log_likelihood).all():
            raise UserError("the model gives a log-likelihood that is not a number; its weights are damaged")
        self.cost.tokens += int(sizes.sum())
        return Scores(log_likelihood, tokens.astype(np.int64), hits == tokens)

    def attempt(
        self, trees: Sequence[Tree], sizes: np.ndarray, endings: int, progress: Progress | None
    ) -> np.ndarray | None:
        """Sums of this rank's batches, (3, endings); None on every rank if any rank ran out of memory."""
        own = None
        try:
            plans = (packed if self.compile else bucketed)(sizes, self.batch_tokens)
            self.warm_up(plans, trees)
            queue = Queue(self)
            for batch, done in self.share(plans, trees):
                queue.add(*self.hidden_at_slots(batch))
                if progress:
                    progress(done, len(trees))
            own = queue.sums(endings)
        except torch.OutOfMemoryError:
            pass
        # Outside the except block: the traceback keeps the tensors of its frames alive.
        if not self.mesh.any(own is None):
            return own
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def warm_up(self, plans: Sequence[BatchPlan], trees: Sequence[Tree]) -> None:
        """Compile for the new shapes in `plans`, and count the time as compilation."""
        if not self.compile:
            return
        for plan in {plan[1:]: plan for plan in plans if plan[1:] not in self.shapes}.values():
            started = time.perf_counter()
            hidden, targets, _ = self.hidden_at_slots(fill(plan, trees))
            self.head(*pad_or_truncate(hidden, targets, self.head_rows))
            self.synchronize()
            self.shapes.add(plan[1:])
            self.cost.compile_seconds += time.perf_counter() - started

    def share(self, plans: Sequence[BatchPlan], trees: Sequence[Tree]) -> Iterator[tuple[PackedBatch, int]]:
        """Yield this rank's batches, each with the number of trees that all ranks have done after it.

        All ranks get equally many batches, the last possibly empty: every forward of a sharded model is collective.
        """
        done, size = 0, self.mesh.world_size
        for first in range(0, len(plans), size):
            mine = plans[first : first + size][self.mesh.rank : self.mesh.rank + 1]
            plan = mine[0] if mine else plans[first]._replace(rows=())
            done += sum(len(row) for plan in plans[first : first + size] for row in plan.rows)
            yield fill(plan, trees), done

    def hidden_at_slots(self, batch: PackedBatch) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return hidden states (S, C) at the slots of `batch`, the targets (S,) that they predict, and the numbers of
        the endings that own the targets, (S,) on the host."""
        rows = to_device(np.stack([batch.idx, batch.positions, batch.ends]), self.mesh.device)  # (3, B, T)
        chosen = to_device(np.stack([batch.slots, batch.targets]), self.mesh.device)  # (2, S)
        hidden = self.hidden(*rows)  # (B, T, C)
        return hidden.flatten(0, 1)[chosen[0]], chosen[1], batch.owners

    def synchronize(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


class Queue:
    """Hidden states at slots, collected over batches until they fill a call of the head."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.n_waiting = 0
        self.found: list[tuple[Tensor, Tensor]] = []  # log-probabilities and argmax hits, on the device
        self.owners: list[np.ndarray] = []

    def add(self, hidden: Tensor, targets: Tensor, owners: np.ndarray) -> None:
        self.waiting.append((hidden, targets))
        self.owners.append(owners)
        self.n_waiting += len(owners)
        if self.n_waiting >= self.scorer.head_rows:
            self.compute(full_calls_only=True)

    def compute(self, *, full_calls_only: bool) -> None:
        """Call the head on the waiting states; with `full_calls_only`, a remainder stays queued."""
        rows = self.scorer.head_rows
        hidden, targets = (torch.cat(parts) for parts in zip(*self.waiting))
        end = len(hidden) // rows * rows if full_calls_only else len(hidden)
        for part in zip(hidden[:end].split(rows), targets[:end].split(rows)):
            n = len(part[0])
            found = self.scorer.head(*(pad_or_truncate(*part, rows) if self.scorer.compile else part))
            self.found.append((found[0][:n], found[1][:n]))
        self.waiting = [(hidden[end:], targets[end:])]
        self.n_waiting = len(hidden) - end

    def sums(self, endings: int) -> np.ndarray:
        """Sum per ending, (3, endings) float64: log-likelihood, number of scored tokens, number of argmax hits."""
        if self.n_waiting:
            self.compute(full_calls_only=False)
        if not self.found:
            return np.zeros((3, endings))
        owners = np.concatenate(self.owners)
        log_p, hit = (torch.cat([x.cpu() for x in part]).numpy() for part in zip(*self.found))
        weights = (log_p, np.ones(len(hit)), hit)
        return np.stack([np.bincount(owners, weights=x, minlength=endings) for x in weights])


def pad_or_truncate(hidden: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Zero-pad or truncate `hidden` (N, C) and `targets` (N,) to `rows`, so that the head compiles once."""
    missing = max(0, rows - len(hidden))
    return F.pad(hidden, (0, 0, 0, missing))[:rows], F.pad(targets, (0, missing))[:rows]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to `device`, asynchronously to a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def log_probability(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` (N,) under `logits` (N, V), in nats, float32 (float64 for float64 logits), and
    whether each target is the argmax (the first one of a tie)."""
    likeliest = logits.argmax(dim=-1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.device.type == "cpu":
        return -F.cross_entropy(logits, targets, reduction="none"), likeliest == targets
    chosen = logits.gather(1, targets[:, None])[:, 0]  # torch.compile fuses this form into one pass
    return chosen - logits.logsumexp(dim=-1), likeliest == targets
