"""The next steps' batches, made in a background thread while the device computes."""

from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor

from regpt.data.batch import Batch
from regpt.data.loader import StepBatches


class Prefetcher:
    """Batches of `loader`, up to `ahead` steps of them made in advance: the same batches, whatever the timing.

    A step is asked for by its number, so any order of steps will do; only going forward in micro-batches of one size
    is fast. An error in the thread reaches the caller of the step that it belongs to. Use it as a context, or call
    `close`.
    """

    def __init__(self, loader: StepBatches, *, ahead: int = 2, steps: int | None = None) -> None:
        """`steps` is the length of the run: nothing is read ahead beyond it."""
        assert ahead >= 1
        self.loader = loader
        self.seq_len = loader.seq_len
        self.ahead = ahead
        self.steps = steps
        self.micro_batch_rows: int | None = None  # of what is being made
        self.made: dict[int, Future[list[Batch]]] = {}
        # Its thread starts with the first step.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="regpt-prefetch")

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        """The micro-batches of `step`, counted from 0; `micro_batch_rows` as in `StepBatches`."""
        if micro_batch_rows != self.micro_batch_rows:
            self.discard(set(self.made))
            self.micro_batch_rows = micro_batch_rows
        end = step + self.ahead + 1
        wanted = range(step, max(step + 1, end if self.steps is None else min(end, self.steps)))
        self.discard(self.made.keys() - set(wanted))
        for following in wanted:
            if following not in self.made:
                self.made[following] = self.thread.submit(self.loader.step, following, micro_batch_rows)
        return self.made[step].result()

    def discard(self, steps: Set[int]) -> None:
        for step in steps:
            self.made.pop(step).cancel()

    def close(self) -> None:
        """Give up what is not begun, and wait for what is."""
        self.made.clear()
        self.thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
