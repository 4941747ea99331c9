"""What copies a run folder, in trouble: a network that fails, rights that are missing, a lease that is lost."""

import pytest
from mirrors import DEAD, add, journal, mirror, steps

from regpt.checkpoint.mirror import Mirror, Undelivered
from regpt.errors import UserError
from regpt.remote.lease import Lease, LeaseLost
from regpt.remote.retry import Patience
from remote_stores import FaultyStore

pytest.importorskip("fsspec")


def test_everything_arrives_when_trouble_at_the_end_of_the_run_is_over(run, saved, url, capsys):
    add(run, saved, 1)
    trouble = iter([True] * 2 + [False] * 100)

    def before(kind: str, name: str) -> None:
        if not name.startswith("lease/") and next(trouble):
            raise ConnectionError("no route to host")

    m = mirror(run, url)
    m.store.before = before  # type: ignore[attr-defined]
    m.closing = True
    m.work()
    assert m.failure is None
    assert capsys.readouterr().err.count(f"{url}: no route to host; trying again in") == 2
    assert steps(url) == ["step-00000001"]


def test_trouble_during_the_run_leaves_all_tries_for_its_end(run, saved, url):
    add(run, saved, 1)
    m, seen = mirror(run, url), []

    def before(kind: str, name: str) -> None:
        if name.startswith("lease/"):
            return
        seen.append(m.closing)
        if len(seen) == 50:  # the run ends after a long while without a network
            m.closing = True
        if seen.count(True) < 3:
            raise ConnectionError("no route to host")

    m.store.before = before  # type: ignore[attr-defined]
    m.wake.set()
    m.work()
    assert m.failure is None
    assert len(m.said) == 1  # type: ignore[attr-defined]
    assert steps(url) == ["step-00000001"]


def test_trouble_that_lasts_is_one_sentence_that_names_what_is_kept(run, saved, url):
    add(run, saved, 1)

    def before(kind: str, name: str) -> None:
        if not name.startswith("lease/"):
            raise ConnectionError("no route to host")

    m = mirror(run, url)
    m.store.before = before  # type: ignore[attr-defined]
    m.start()
    with pytest.raises(Undelivered):
        m.finish()
    assert isinstance(m.failure, Undelivered)
    assert m.failure.exit_code == 75
    assert str(m.failure) == (
        f"{url} could not be brought up to date: no route to host; everything is in {run} on this machine, "
        f"copy it with: regpt train --resume {url}"
    )
    assert m.sending.startswith("env.json, ")
    with pytest.raises(PermissionError):  # what lasts is not tried again at the end
        refuse(m)


def refuse(m: Mirror) -> None:
    def before(kind: str, name: str) -> None:
        raise PermissionError("Access Denied")

    m.store.before = before  # type: ignore[attr-defined]
    n = len(m.said)  # type: ignore[attr-defined]
    m.failure = None
    m.work()
    assert m.failure
    assert len(m.said) == n  # type: ignore[attr-defined]
    m.copy_all()


def test_waits_grow_to_a_limit():
    assert [Patience().wait(n) for n in (1, 2, 3, 7, 100)] == [1, 2, 4, 60, 60]


@pytest.mark.parametrize("last", ["env.json", "model.safetensors", "tokenizer.json"])
def test_a_holder_that_lost_its_lease_changes_nothing_from_then_on(run, saved, url, last):
    add(run, saved, 1)
    m, others = mirror(run, url), []

    def before(kind: str, name: str) -> None:
        if name.endswith(last):  # this file is on its way; the next one must not be, the manifest neither
            other = Lease(FaultyStore(url))
            other.acquire(DEAD[-1])
            others.append(other)

    m.store.before = before  # type: ignore[attr-defined]
    m.start()
    with pytest.raises(UserError, match=f"was taken over by process .*; what this process trained is in {run}"):
        m.finish()
    assert journal(m)[-1][1].endswith(last)
    assert steps(url) == []
    with pytest.raises(LeaseLost):
        m.copy_all()
    others[0].check()


@pytest.mark.parametrize("action", ["drop", "gone"])
def test_a_holder_that_lost_its_lease_deletes_nothing(run, saved, url, action):
    folder = add(run, saved, 1)
    m = mirror(run, url)
    m.copy_all()
    other = Lease(FaultyStore(url))
    other.acquire(DEAD[-1])
    before = journal(m)
    (run / "env.json").unlink()
    with pytest.raises(LeaseLost):
        m.drop(folder.name) if action == "drop" else m.copy_all()
    assert journal(m) == before


def test_the_thread_copies_what_it_is_told_of(run, saved, url):
    m = mirror(run, url)
    m.start()
    add(run, saved, 1)
    m.saver.saved()
    add(run, saved, 2)
    m.finish()
    assert steps(url) == ["step-00000001", "step-00000002"]
