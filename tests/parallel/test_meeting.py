"""A group of processes finds a name of its own in a store that holds what earlier groups have left."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from regpt.parallel.meeting import agree_on_name


def agreed(store: HashStore, ranks: list[int], world_size: int, seconds: float = 20.0) -> list[str]:
    """The names that the given ranks come to; "" for one that gave up."""
    names = dict.fromkeys(ranks, "")

    def come(rank: int) -> None:
        try:
            names[rank] = agree_on_name(store, rank, world_size, seconds)
        except RuntimeError as error:
            names[rank] = f"gave up: {error}"

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(names.values())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_all_agree_whoever_comes_first(order: list[int]):
    assert len(set(agreed(HashStore(), order, 3))) == 1


def test_each_group_in_the_same_store_has_another_name():
    store = HashStore()
    names = [agreed(store, [0, 1, 2], 3) for _ in range(4)]
    assert all(len(set(group)) == 1 for group in names)
    assert len({group[0] for group in names}) == 4


def test_a_group_that_never_met_does_not_disturb_the_next():
    store = HashStore()
    assert "rank 0 did not come within" in agreed(store, [1, 2], 3, seconds=0.05)[0]
    assert agreed(store, [0, 2], 3, seconds=0.2)[0].endswith("did not come within 0.2 seconds: 1")
    group = agreed(store, [0, 1, 2], 3)
    assert len(set(group)) == 1
    assert len(group[0]) == 32


def test_one_process_waits_for_nobody():
    store = HashStore()
    store.set_timeout(timedelta(seconds=1))
    assert len(agree_on_name(store, 0, 1, 1.0)) == 32
