"""Micro-batch size of all ranks; smaller after a rank ran out of memory (OOM)."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from regpt.errors import UserError
from regpt.parallel.mesh import Mesh
from regpt.train.memory import free_memory, is_out_of_memory

Result = TypeVar("Result")
LAST_RESORTS = (
    "try --train.activation-checkpointing true, --optim.offload true, or --train.weight-dtype bf16 with "
    "--optim.state-dtype bf16, a smaller model, a shorter data.seq_len or a device with more memory"
)


class Attempt:
    """A context that an out-of-memory error leaves quietly; `out_of_memory` afterwards."""

    out_of_memory = False

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.out_of_memory = error is not None and is_out_of_memory(error)
        return self.out_of_memory


class MicroBatch:
    """The present number of rows, the same in every process.

    Args:
        rows: to begin with; divides what a process computes in a step.
        mesh: the processes that agree on the number.
        on_fewer: called in every process with the new number, before anything is computed with it.
        pinned: never continue with fewer rows, which rounds differently.
    """

    def __init__(self, rows: int, mesh: Mesh, on_fewer: Callable[[int], None] = lambda rows: None, *, pinned=False):
        self.rows, self.mesh, self.on_fewer, self.pinned = rows, mesh, on_fewer, pinned

    def attempts(self) -> Iterator["Attempt"]:
        """`for attempt in micro_batch.attempts(): with attempt: …`: the block again, with fewer rows, as long as one of
        the processes runs out of memory in it.

        The block begins anew each time, and calls no collective: a process that failed would leave the others waiting
        in it. All meet here after it, on the CPU, without waiting for their devices.

        Raises:
            UserError: one row at a time is too much.
        """
        while True:
            attempt = Attempt()
            yield attempt
            if not self.mesh.any(attempt.out_of_memory):
                return
            free_memory(self.mesh.device)
            self.reduce()

    def attempt(self, compute: Callable[[int], Result]) -> Result:
        """`compute(rows)`, repeated as in `attempts`."""
        results: list[Result] = []
        for attempt in self.attempts():
            results.clear()
            with attempt:
                results.append(compute(self.rows))
        return results[0]

    def reduce(self) -> None:
        """Continue with the largest divisor of the present number that is at most half of it."""
        if self.rows == 1:
            raise UserError(f"out of memory with train.micro_batch_rows = 1, the smallest; {self.advice()}")
        if self.pinned:
            raise UserError(
                f"out of memory with train.micro_batch_rows = {self.rows}, which train.deterministic pins; "
                f"{self.advice()}"
            )
        self.rows = fewer(self.rows)
        self.on_fewer(self.rows)

    def advice(self) -> str:
        """Advice for an OOM that a smaller micro-batch cannot mend."""
        if self.rows > 1:
            return f"try --train.micro-batch-rows {fewer(self.rows)}, which computes the same update in smaller parts"
        return LAST_RESORTS


def fewer(rows: int) -> int:
    """The largest divisor of `rows` (2 or more) that is at most half of it; it divides the batch as `rows` does."""
    return max(n for n in range(1, rows // 2 + 1) if rows % n == 0)
