"""A process that waits in vain says for whom."""

import json
import time
from threading import Event

import pytest

from regpt.parallel import pulse as module
from regpt.parallel.pulse import HUNG, Pulse, Watch, diagnosis, key, watched


def note(step: int, waits: int, doing: str = "", time: float = 100.0) -> dict:
    return {"step": step, "waits": waits, "doing": doing, "time": time}


OWN = note(7, 21, "the sum of the gradients")


def test_the_ranks_that_have_begun_fewer_waits_are_missing():
    notes = {0: OWN, 1: note(6, 20, time=88.0), 2: OWN}
    assert diagnosis(0, 4, OWN, notes, 61.0) == (
        "step 7: rank 0 has waited 61 seconds for the sum of the gradients; missing: "
        "rank 1 (computing in step 6, last heartbeat 12 seconds ago), rank 3 (no heartbeat yet)"
    )


def test_when_nobody_is_missing_the_device_or_the_network_is_suspected():
    assert "all 2 ranks are in it: suspect" in diagnosis(0, 2, OWN, {0: OWN, 1: OWN}, 61.0)


def test_without_a_store_its_host_is_said_to_be_gone():
    assert diagnosis(1, 2, OWN, {}, 61.0).endswith("the rendezvous store cannot be reached, so its host is gone")


def test_a_pulse_counts_waits_and_knows_the_present_one():
    pulse = Pulse()
    with pulse.waiting("x"):
        assert (pulse.waits, pulse.doing) == (1, "x")
    with pytest.raises(KeyError), pulse.waiting("y"):
        raise KeyError
    assert (pulse.waits, pulse.doing) == (2, "")


def test_a_wait_inside_another_is_not_one_of_its_own():
    pulse = Pulse()
    with pulse.waiting("x"):
        since = pulse.since
        with pulse.waiting("y"):
            assert (pulse.waits, pulse.doing) == (1, "x")
        assert (pulse.waits, pulse.doing, pulse.since) == (1, "x", since)
    assert (pulse.waits, pulse.doing) == (1, "")


class Shelf(dict):
    """A store in memory."""

    def set(self, name: str, value: str) -> None:
        self[name] = value.encode()

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)


def test_the_process_ends_when_its_wait_is_too_long_and_not_before(monkeypatch, capfd):
    ended: list[int] = []
    pulse, shelf = Pulse(), Shelf({key(1): json.dumps(note(4, 0, time=time.time())).encode()})
    pulse.step = 5

    def end(code: int) -> None:
        ended.append(code)
        pulse.since += 3600  # so that it ends once

    monkeypatch.setattr(module.os, "_exit", end)
    with watched(pulse, 0, 2, lambda: shelf, seconds=0.2):
        with pulse.waiting("a common decision"):
            while not ended:
                pass
        said = capfd.readouterr().err
    assert ended == [HUNG]
    assert "regpt: step 5: rank 0 has waited 0 seconds for a common decision; missing: rank 1 (computing in" in said
    assert json.loads(shelf[key(0)])["step"] == 5


def at_work(waits: int = 20, doing: str = "", work: str = "writing a checkpoint") -> dict:
    return note(6, waits, doing) | {"work": work}


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    return codes


def watch(rank: int = 0, world_size: int = 3) -> Watch:
    """In the wait of `OWN`."""
    pulse = Pulse()
    pulse.step, pulse.waits, pulse.doing = OWN["step"], OWN["waits"], OWN["doing"]
    return Watch(pulse, rank, world_size, Shelf, 60.0, Event())


def test_a_rank_that_says_that_it_writes_is_waited_for_as_long_as_it_says_so(ended, capfd):
    waiting, all_notes = watch(), {0: OWN, 1: at_work(), 2: OWN}
    for now in (100.0, 161.0, 222.0):  # as its own clock says
        waiting.judge(all_notes | {1: at_work() | {"time": now}}, 61.0)
        assert time.monotonic() - waiting.excused < 60
    assert ended == []
    assert capfd.readouterr().err == "regpt: step 7: rank 1 is writing a checkpoint; the others wait for it\n" * 3
    watch(rank=2).judge(all_notes, 61.0)
    assert not capfd.readouterr().err  # rank 0 says it for all
    waiting.judge(all_notes | {1: at_work() | {"time": 222.0}}, 61.0)  # nothing was heard since
    assert ended == [HUNG]
    assert "missing: rank 1 (writing a checkpoint in step 6, last heartbeat" in capfd.readouterr().err


@pytest.mark.parametrize(
    "notes",
    [
        {0: OWN, 1: at_work(work=""), 2: OWN},  # computing
        {0: OWN, 1: at_work(doing="a common decision"), 2: OWN},  # in another wait
        {0: OWN, 1: at_work(), 2: note(6, 20)},  # another one computes
        {0: OWN, 1: at_work()},  # no heartbeat yet
        {0: OWN, 1: OWN, 2: OWN},  # all are in it
        {},  # the store is gone
    ],
)
def test_only_work_of_all_that_are_missing_excuses(ended, notes):
    watch().judge(notes, 61.0)
    assert ended == [HUNG]


def test_work_ends_where_it_ends_and_a_wait_inside_it_is_a_wait():
    pulse = Pulse()
    with pulse.working("evaluating"):
        with pytest.raises(KeyError), pulse.working("reading its data"):
            raise KeyError
        assert pulse.note()["work"] == "evaluating"
        with pulse.waiting("a sum of results"):
            assert not module.at_work(pulse.note(), None)
        assert module.at_work(pulse.note(), None)
    assert pulse.note()["work"] == ""


def test_a_long_computation_is_no_wait(monkeypatch):
    monkeypatch.setattr(module.os, "_exit", lambda code: pytest.fail("ended"))
    pulse = Pulse()
    noted = Shelf()
    with watched(pulse, 0, 2, lambda: noted, seconds=0.01):
        pulse.since -= 3600
        while key(0) not in noted:
            pass
