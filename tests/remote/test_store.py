"""One behaviour of all stores: a file system in memory, a folder, and servers that imitate S3 and Google's storage."""

from collections.abc import Iterator

import pytest

from regpt.remote.lease import Lease, LeaseLost
from regpt.remote.store import Store
from remote_stores import PATIENT, google_bucket, memory_bucket, s3_bucket

pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "folder", "s3", "gs"])
def store(request, tmp_path, monkeypatch) -> Iterator[Store]:
    if request.param == "memory":
        with memory_bucket() as url:
            yield Store(url, PATIENT)
    elif request.param == "folder":
        yield Store((tmp_path / "store").as_uri(), PATIENT)
    elif request.param == "gs":
        with google_bucket() as url:
            yield Store(f"{url}/runs/a", PATIENT)
    else:
        with s3_bucket() as (url, environment):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            yield Store(f"{url}/runs/a", PATIENT)


@pytest.mark.filterwarnings("default")  # those of the servers and their libraries
def test_every_store_reads_what_was_written_creates_once_and_deletes(store, tmp_path):
    assert store.files() == {}
    assert store.read("config.toml") is None
    store.write("config.toml", b"one")
    store.write("config.toml", b"three")
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(range(256)) * 100)
    store.put("checkpoints/step-00000001/model.bin", file)
    store.write("checkpoints/step-00000001.new/model.bin", b"")
    assert store.files() == {
        "config.toml": 5,
        "checkpoints/step-00000001/model.bin": 25600,
        "checkpoints/step-00000001.new/model.bin": 0,
    }
    assert store.files("checkpoints/step-00000001") == {"checkpoints/step-00000001/model.bin": 25600}
    assert store.read("config.toml") == b"three"
    store.get("checkpoints/step-00000001/model.bin", tmp_path / "copy" / "model.bin")
    assert (tmp_path / "copy" / "model.bin").read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["model.bin"]
    assert store.create("lease/1.json", b"mine")
    assert not store.create("lease/1.json", b"theirs")
    assert store.read("lease/1.json") == b"mine"
    assert not store.get("nothing", tmp_path / "nothing")
    for name in ("config.toml", "config.toml", "nothing"):
        store.remove(name)
    assert "config.toml" not in store.files()


@pytest.mark.filterwarnings("default")
def test_every_store_has_one_holder_at_a_time(store, capsys):
    first, second = Lease(store), Lease(store)
    first.acquire()
    second.acquire(first.claim.token)
    assert "taken over unless" not in capsys.readouterr().err  # claims there are exclusive
    second.renew()
    with pytest.raises(LeaseLost):
        first.renew()
    second.renew(released=True)
    newest = second.newest()
    assert newest is not None
    assert (newest.number, newest.renewals, newest.released) == (2, 1, True)
