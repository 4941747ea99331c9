"""One writer at a time: claims on a store, by processes whose clocks need not agree."""

import json

import pytest

from regpt.errors import UserError
from regpt.remote.lease import Claim, Lease, LeaseLost
from regpt.remote.store import Store
from remote_stores import FaultyStore, Hand

pytest.importorskip("fsspec")


def lease(url: str, hand: Hand | None = None, host: str = "here", store: Store | None = None) -> Lease:
    store = store or FaultyStore(url)
    store.patience = (hand or Hand()).patience
    made = Lease(store, 60)
    made.claim = made.claim._replace(host=host, pid=7)
    return made


@pytest.fixture
def acquire(capsys):
    """Acquire a lease; the lines that it prints meanwhile."""

    def acquired(given: Lease, **options) -> list[str]:
        capsys.readouterr()
        given.acquire(**options)
        return capsys.readouterr().err.splitlines()

    return acquired


def test_a_claim_says_who_holds_it(url, acquire):
    first = lease(url)
    first.claim = first.claim._replace(claimed=1000.0)
    assert acquire(first) == []
    stored = json.loads(first.store.read("lease/00000001.json") or b"")
    assert stored == {
        "number": 1, "token": first.claim.token, "host": "here", "pid": 7, "claimed": 1000.0,
        "seconds": 60, "renewals": 0, "released": False,
    }  # fmt: skip


@pytest.mark.parametrize("their_clock", [1e9, 5.0, 9e9])
def test_a_holder_that_renews_keeps_the_lease_whatever_its_clock_says(url, their_clock, monkeypatch, acquire):
    first = lease(url, host="there")
    acquire(first)
    monkeypatch.setattr("time.time", lambda: their_clock)
    hand = Hand()
    hand.meanwhile = lambda: len(hand.slept) == 3 and first.renew()
    second = lease(url, hand)
    with pytest.raises(
        UserError, match=r"bucket/runs/a is being written by process 7 on there, who renews its lease of 60 seconds"
    ):
        acquire(second)
    assert len(hand.slept) == 3
    first.check()
    assert sorted(first.store.files("lease")) == ["lease/00000001.json"]


def test_a_lease_without_renewals_is_taken_over_after_its_time_and_the_old_holder_notices(url, acquire):
    first = lease(url, host="there")
    acquire(first)
    hand = Hand()
    second = lease(url, hand)
    said = acquire(second)
    assert said == [f"regpt: process 7 on there holds {url}; taken over unless renewed within 60 seconds"]
    assert sum(hand.slept) >= 60
    assert sorted(second.store.files("lease")) == ["lease/00000001.json", "lease/00000002.json"]
    stored = second.store.content(), second.store.read("lease/00000002.json")
    for action in (first.check, first.renew, lambda: first.renew(released=True)):
        with pytest.raises(LeaseLost, match="was taken over by process 7 on here"):
            action()
    assert (second.store.content(), second.store.read("lease/00000002.json")) == stored
    assert isinstance(first.store, FaultyStore)
    assert first.store.journal == []
    second.renew()


def test_renewals_just_in_time_are_enough(url, acquire):
    first = lease(url)
    acquire(first)
    hand = Hand()
    hand.meanwhile = lambda: sum(hand.slept) >= 60 and first.renew()  # in the last moment
    with pytest.raises(UserError, match="is being written by"):
        acquire(lease(url, hand))


def test_a_released_lease_is_free_at_once(url, acquire):
    first = lease(url)
    acquire(first)
    first.renew(released=True)
    hand = Hand()
    second = lease(url, hand)
    assert acquire(second) == []
    assert hand.slept == []
    assert second.claim.number == 2
    with pytest.raises(LeaseLost):
        first.renew()


def test_the_claim_of_a_process_that_is_known_to_be_dead_is_taken_over_at_once(url, acquire):
    first = lease(url)
    acquire(first)
    hand = Hand()
    assert acquire(lease(url, hand), known=first.claim.token) == []
    assert hand.slept == []
    with pytest.raises(LeaseLost):  # the same token, and a newer number
        first.check()


def test_of_two_that_create_the_same_claim_one_gets_it(url, monkeypatch, acquire):
    first, second = lease(url, host="there"), lease(url)
    hand = Hand()
    hand.meanwhile = lambda: first.renew()
    second.store.patience = hand.patience
    create = Store.create

    def late(self, name: str, data: bytes) -> bool:
        if self is second.store and first.claim.number == 0:
            acquire(first)  # between the look of the second and its creation
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", late)
    with pytest.raises(UserError, match="is being written by process 7 on there"):
        acquire(second)
    first.check()


def test_a_claim_whose_number_was_taken_meanwhile_is_void(url, monkeypatch, acquire):
    first, third, late = lease(url, host="one"), lease(url, host="three"), lease(url, host="late")
    acquire(first)
    first.renew(released=True)
    hand = Hand()
    hand.meanwhile = lambda: third.renew()
    late.store.patience = hand.patience
    create = Store.create

    def slow(self, name: str, data: bytes) -> bool:
        if self is late.store and third.claim.number == 0:
            between = lease(url, host="two")
            acquire(between)
            between.renew(released=True)
            acquire(third)
            assert name == "lease/00000002.json"
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", slow)
    with pytest.raises(UserError, match="is being written by process 7 on three"):
        acquire(late)
    third.check()


def test_an_answer_that_was_lost_costs_nothing(url, monkeypatch, acquire):
    create, calls = Store.create, []

    def torn(self, name: str, data: bytes) -> bool:
        done = create(self, name, data)
        calls.append(done)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        return done

    monkeypatch.setattr(Store, "create", torn)
    first = lease(url)
    acquire(first)
    assert calls == [True, False]
    first.renew()


def test_in_a_store_that_creates_twice_the_last_writer_wins(url, monkeypatch, acquire):
    def create(self, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(Store, "create", create)
    first, second = lease(url), lease(url, host="there")
    acquire(first)
    second.claim = second.claim._replace(number=1)  # it saw no claim either
    create(second.store, second.claim.name, second.claim.data())
    with pytest.raises(LeaseLost, match="was taken over by process 7 on there"):
        first.check()
    second.renew()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"seconds": "soon"}', b'{"seconds": 1e999, "token": 1}'])
def test_a_claim_that_cannot_be_read_is_waited_for(url, content, acquire):
    store = FaultyStore(url)
    store.write("lease/00000004.json", content)
    store.write("lease/notes.txt", b"?")
    hand = Hand()
    second = lease(url, hand)
    acquire(second)
    assert sum(hand.slept) >= 60
    assert second.claim.number == 5


class Ticks:
    """A stop signal that comes after a number of intervals."""

    def __init__(self, n: int) -> None:
        self.left, self.waited = n, []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        self.left -= 1
        return self.left < 0


def test_a_network_that_fails_for_a_while_does_not_end_the_renewals(url, acquire):
    trouble = iter([True, True, False, False])

    def before(kind: str, name: str) -> None:
        if next(trouble):
            raise ConnectionError("no route")

    first = lease(url, store=FaultyStore(url, before))
    acquire(first)
    ticks = Ticks(4)
    first.keep(ticks)  # type: ignore[arg-type]
    stored = json.loads(first.store.read("lease/00000001.json") or b"")
    assert stored["renewals"] >= 2
    assert set(ticks.waited) == {15.0}


def test_the_thread_renews_until_the_lease_is_released(url):
    first = Lease(FaultyStore(url), 0.004)
    first.acquire()

    def train() -> None:
        with first.kept():
            while first.claim.renewals < 3:
                pass
            raise UserError("of the run")

    with pytest.raises(UserError, match="of the run"):
        train()
    newest = first.newest()
    assert newest is not None
    assert newest.released


def test_after_ctrl_c_the_lease_is_not_released(url):
    first = Lease(FaultyStore(url))
    first.acquire()
    with pytest.raises(KeyboardInterrupt), first.kept():
        raise KeyboardInterrupt
    newest = first.newest()
    assert newest is not None
    assert not newest.released


def test_claims_are_in_the_order_of_their_numbers():
    names = [Claim(number, "").name for number in (9, 10, 100, 12345678)]
    assert names == sorted(names)
