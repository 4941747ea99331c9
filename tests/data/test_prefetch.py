"""Batches made in the background: the loader's own, whatever the timing."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regpt.data.batch import Batch
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError


class Numbered:
    """Step s is one batch that holds s; remembers what was asked for, and in which thread."""

    seq_len = 1

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.broken:
            raise UserError(f"step {step} cannot be read")
        return [Batch(torch.tensor([[step]]), torch.tensor([[step + 1]]))]


def value(batches: list[Batch]) -> int:
    return int(batches[0].idx)


@given(st.lists(st.integers(0, 20), max_size=15), st.integers(1, 4), st.sampled_from([None, 5, 21]))
def test_any_step_is_the_loaders_in_any_order_and_as_often_as_asked(steps, ahead, last):
    with Prefetcher(Numbered(), ahead=ahead, steps=last) as batches:
        assert [value(batches.step(step)) for step in steps] == steps


def test_the_next_steps_are_made_in_the_background_and_each_once():
    loader = Numbered()
    with Prefetcher(loader, ahead=2) as batches:
        for step in range(5):
            batches.step(step)
        batches.made[6].result()
    assert loader.asked == [0, 1, 2, 3, 4, 5, 6]
    assert all(name.startswith("regpt-prefetch") for name in loader.threads)


def test_nothing_is_read_beyond_the_last_step():
    loader = Numbered()
    with Prefetcher(loader, ahead=3, steps=4) as batches:
        for step in range(4):
            batches.step(step)
    assert loader.asked == [0, 1, 2, 3]


def test_an_error_reaches_the_step_that_it_belongs_to_and_no_other():
    with Prefetcher(Numbered(broken=2), ahead=2) as batches:
        assert value(batches.step(0)) == 0
        assert value(batches.step(1)) == 1
        for _ in range(2):
            with pytest.raises(UserError, match="step 2 cannot be read"):
                batches.step(2)
        assert value(batches.step(3)) == 3


def test_closing_ends_the_thread_and_gives_up_what_is_not_begun():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Numbered):
        def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
            if step:
                begun.set()
                go_on.wait()
            return super().step(step, micro_batch_rows)

    loader = Slow()
    batches = Prefetcher(loader, ahead=3)
    batches.step(0)
    begun.wait()
    given_up = threading.Semaphore(0)
    for step in (2, 3):
        batches.made[step].add_done_callback(lambda _: given_up.release())
    closing = threading.Thread(target=batches.close)
    closing.start()
    both = given_up.acquire(timeout=30) and given_up.acquire(timeout=30)
    go_on.set()  # whatever came of it: nothing may hang
    closing.join()
    assert both
    assert loader.asked == [0, 1]
    assert not any(thread.name in loader.threads for thread in threading.enumerate())


def test_a_prefetcher_that_was_never_used_closes():
    with Prefetcher(Numbered()):
        assert not any(thread.name.startswith("regpt-prefetch") for thread in threading.enumerate())
