"""A run folder copied to a store: in which order, what an interruption leaves, what is deleted when."""

import os
import shutil
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.fetch import restore
from regpt.checkpoint.lease import Lease, LeaseLost
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint, newest_checkpoint
from regpt.checkpoint.mirror import Mirror
from regpt.checkpoint.save import save_checkpoint
from regpt.errors import UserError
from regpt.text.bpe import train_bpe
from remote_stores import FaultyStore, Killed, memory_bucket

pytest.importorskip("fsspec")
FILES = {"model.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "manifest.json"}


@pytest.fixture
def url():
    with memory_bucket() as url:
        yield url


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 1, 2, 3 and 4; read only."""
    run = tmp_path_factory.mktemp("saved") / "run"
    tokenizer = train_bpe(["ba do mi ta ru ke"], 257)
    model = tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=257)).float()
    for step in (1, 2, 3, 4):
        tiny.save_model(checkpoint_folder(run, step), model, tokenizer, step)
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder without checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "env.json", "metrics.jsonl"):
        (folder / name).write_text(f'{{"{name}": 1}}\n', encoding="utf-8")
    return folder


def add(run: Path, saved: Path, step: int) -> Path:
    folder = checkpoint_folder(run, step)
    shutil.copytree(checkpoint_folder(saved, step), folder)
    return folder


def mirror(run: Path, url: str, keep_last: int = 2, keep_every: int = 0, **options) -> Mirror:
    lease = Lease(FaultyStore(url, **options))
    lease.acquire(dead=DEAD)
    DEAD.add(lease.claim.token)
    made = Mirror(run, lease, CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    made.said = []  # type: ignore[attr-defined]
    made.say = made.said.append  # type: ignore[attr-defined]
    return made


DEAD: set[str] = set()  # claims of the mirrors that these tests have given up


def journal(given: Mirror) -> list[tuple[str, str]]:
    assert isinstance(given.store, FaultyStore)
    return [(kind, name) for kind, name in given.store.journal if not name.startswith("lease/")]


def steps(url: str) -> list[str]:
    """The complete checkpoints of the store."""
    return sorted(name.split("/")[1] for name in FaultyStore(url).files() if name.endswith("/manifest.json"))


def newest_step(url: str, into: Path) -> int:
    """The step at which another machine would go on."""
    into.mkdir()
    assert restore(FaultyStore(url), into) == []
    return load_checkpoint(newest_checkpoint(into)).step


def test_the_manifest_comes_after_the_other_files_and_the_metrics(run, saved, url):
    add(run, saved, 1)
    m = mirror(run, url)
    m.copy_all()
    names = [name for _, name in journal(m)]
    start = "checkpoints/step-00000001/"
    assert names[:3] == ["env.json", "metrics.jsonl", "config.toml"]
    assert {name.removeprefix(start) for name in names[3:]} == FILES
    assert names[-1] == start + "manifest.json"
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"st', encoding="utf-8")
    add(run, saved, 2)
    m.copy_all()
    names = [name for _, name in journal(m)]
    assert names.index("metrics.jsonl", 3) < names.index("checkpoints/step-00000002/manifest.json")
    assert m.store.read("metrics.jsonl") == b'{"step": 2}\n'  # whole lines
    for step in (1, 2):
        folder = checkpoint_folder(run, step)
        for path in folder.iterdir():
            assert m.store.read(f"checkpoints/{folder.name}/{path.name}") == path.read_bytes()


def test_what_is_there_is_not_copied_again_and_what_has_gone_is_deleted(run, saved, url):
    add(run, saved, 1)
    (run / "evals").mkdir()
    (run / "evals" / "val-step-00000001.jsonl").write_text("{}\n", encoding="utf-8")
    (run / ".lock").touch()
    m = mirror(run, url)
    m.copy_all()
    n = len(journal(m))
    m.copy_all()
    assert len(journal(m)) == n
    (run / "evals" / "val-step-00000001.jsonl").rename(run / "evals" / "val-step-00000002.jsonl")
    m.copy_all()
    assert journal(m)[n:] == [("write", "evals/val-step-00000002.jsonl"), ("remove", "evals/val-step-00000001.jsonl")]
    again = mirror(run, url)  # another process on the same folder: checkpoints are known by their manifests
    again.copy_all()
    assert not [name for _, name in journal(again) if name.startswith("checkpoints/")]
    assert ".lock" not in m.store.files()


def test_folders_that_come_and_go_meanwhile_are_no_trouble(run, saved, url, monkeypatch):
    add(run, saved, 1)
    (run / "evals").mkdir()
    (run / "evals" / "a.jsonl").write_text("{}\n", encoding="utf-8")
    scan, gone = os.scandir, []

    def racing(path):
        if Path(path) == run / "evals":
            gone.append(path)
            raise FileNotFoundError(path)
        assert "checkpoints/." not in Path(path).as_posix()  # half-written checkpoints are none of its business
        return scan(path)

    (run / "checkpoints" / ".step-00000002.tmp-1").mkdir()
    monkeypatch.setattr(os, "scandir", racing)
    m = mirror(run, url)
    m.store.before = lambda kind, name: (run / "env.json").unlink(missing_ok=True)  # type: ignore[attr-defined]
    m.copy_all()
    assert gone
    assert not {"evals/a.jsonl", "env.json"} & set(m.store.files())
    assert steps(url) == ["step-00000001"]


def kill_at(n: int):
    """Ends the process before the n-th change of the store."""
    left = [n]

    def before(kind: str, name: str) -> None:
        left[0] -= not name.startswith("lease/")
        if left[0] < 0:
            raise Killed

    return before


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_copy_killed_at_any_file_leaves_a_run_to_go_on_with(run, saved, url, tmp_path, keep_last):
    for step in (1, 2):
        add(run, saved, step)
    mirror(run, url, keep_last).copy_all()
    before = FaultyStore(url).content()
    add(run, saved, 3)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    ended = seen = 0
    while not ended:
        store = FaultyStore(url)
        store.fs.rm(store.root, recursive=True)
        for name, data in before.items():
            store.write(name, data)
        try:
            mirror(run, url, keep_last, before=kill_at(seen)).copy_all()
            ended = seen
        except Killed:
            seen += 1
        complete = "step-00000003" in steps(url)
        assert newest_step(url, tmp_path / f"other-{seen}-{bool(ended)}") == (3 if complete else 2)
        mirror(run, url, keep_last).copy_all()  # the next process tidies up
        assert steps(url) == ["step-00000002", "step-00000003"][-keep_last:]
        folders = {name.split("/")[1] for name in FaultyStore(url).files("checkpoints")}
        assert sorted(folders) == steps(url)
    assert ended > 10


def test_a_checkpoint_that_is_replaced_is_whole_there_at_every_moment(run, saved, url, tmp_path):
    add(run, saved, 2)
    m = mirror(run, url, keep_last=1)
    m.copy_all()
    before = m.store.content()  # type: ignore[attr-defined]
    checkpoint = load_checkpoint(checkpoint_folder(run, 2))
    state = tiny.replace(checkpoint.state, average_updates=5)
    contents = tiny.Contents(
        checkpoint.config, checkpoint.tokenizer(), dict(checkpoint.weights()), dict(checkpoint.optimizer()), state
    )
    save_checkpoint(checkpoint.folder, contents)
    ended = seen = 0
    while not ended:
        store = FaultyStore(url)
        store.fs.rm(store.root, recursive=True)
        for name, data in before.items():
            store.write(name, data)
        try:
            mirror(run, url, keep_last=1, before=kill_at(seen)).copy_all()
            ended = seen
        except Killed:
            seen += 1
        assert newest_step(url, tmp_path / f"other-{seen}-{bool(ended)}") == 2
    found = load_checkpoint(newest_checkpoint(tmp_path / f"other-{seen}-True"))
    assert found.state.average_updates == 5
    assert steps(url) == ["step-00000002"]


def test_old_checkpoints_are_deleted_there_only_after_newer_ones_are_complete(run, saved, url):
    m = mirror(run, url, keep_last=1, keep_every=2)
    for step in (1, 2, 3, 4):
        add(run, saved, step)
        n = len(journal(m))
        m.copy_all()
        changes = journal(m)[n:]
        removed = [i for i, (kind, _) in enumerate(changes) if kind == "remove"]
        written = [i for i, (kind, name) in enumerate(changes) if kind == "write" and name.endswith("/manifest.json")]
        assert len(written) == 1
        assert all(i > written[0] for i in removed)
        if removed:
            assert changes[removed[0]][1].endswith("/manifest.json")  # what is left is no checkpoint
    assert steps(url) == ["step-00000002", "step-00000004"]
    everything = mirror(run, url, keep_last=0)
    everything.copy_all()
    assert len(steps(url)) == 4


def test_only_what_is_wanted_is_copied_the_newest_first(run, saved, url):
    for step in (1, 2, 3, 4):
        add(run, saved, step)
    m = mirror(run, url, keep_last=2)
    m.copy_all()
    manifests = [name.split("/")[1] for _, name in journal(m) if name.endswith("/manifest.json")]
    assert manifests == ["step-00000004", "step-00000003"]


def test_a_damaged_checkpoint_of_this_machine_is_not_copied(run, saved, url):
    add(run, saved, 1)
    with (add(run, saved, 2) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    mirror(run, url).copy_all()
    assert steps(url) == ["step-00000001"]


def test_a_checkpoint_deleted_here_meanwhile_is_given_up(run, saved, url):
    add(run, saved, 1)

    def before(kind: str, name: str) -> None:
        if name.endswith("1/state.json"):
            shutil.rmtree(checkpoint_folder(run, 1))
            add(run, saved, 2)

    m = mirror(run, url)
    m.store.before = before  # type: ignore[attr-defined]
    m.copy_all()
    assert steps(url) == ["step-00000002"]
    assert {name.split("/")[1] for name in m.store.files("checkpoints")} == {"step-00000002"}


def test_a_checkpoint_that_is_being_copied_is_in_use(run, saved, url):
    folder, seen = add(run, saved, 1), []
    m = mirror(run, url)
    m.store.before = lambda kind, name: seen.append(m.is_uploading(folder))  # type: ignore[attr-defined]
    m.copy_all()
    assert seen == [False] * 3 + [True] * len(FILES)
    assert not m.is_uploading(folder)


def test_a_file_that_arrived_short_gets_no_manifest(run, saved, url, monkeypatch):
    add(run, saved, 1)
    m, put, calls = mirror(run, url), FaultyStore.put, []

    def short(self, name: str, path: Path) -> None:
        calls.append(name)
        if name.endswith("model.safetensors") and calls.count(name) == 1:
            self.write(name, path.read_bytes()[:-8])
        else:
            put(self, name, path)

    monkeypatch.setattr(FaultyStore, "put", short)
    with pytest.raises(ConnectionError, match=r"model\.safetensors arrived with .* of .* bytes"):
        m.copy_all()
    assert steps(url) == []
    m.copy_all()
    assert steps(url) == ["step-00000001"]
    assert calls.count("checkpoints/step-00000001/state.json") == 1  # what had arrived is not sent again


def test_trouble_is_said_once_and_everything_arrives_when_it_is_over(run, saved, url):
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
    assert m.said == [f"{url} could not be written (no route to host); tried again while the run goes on"]  # type: ignore[attr-defined]
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
    m.notify()
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
    assert m.finish()
    assert m.failed
    assert isinstance(m.failure, UserError)
    assert str(m.failure) == (
        f"{url} could not be brought up to date: no route to host; everything is in {run} on this machine, "
        f"copy it with: regpt train --resume {url}"
    )
    files, size = m.left()
    assert files == 3 + len(FILES) - 1
    assert size > 30000
    with pytest.raises(PermissionError):  # what lasts is not tried again at the end
        refuse(m)


def refuse(m: Mirror) -> None:
    def before(kind: str, name: str) -> None:
        raise PermissionError("Access Denied")

    m.store.before = before  # type: ignore[attr-defined]
    n = len(m.said)  # type: ignore[attr-defined]
    m.failure = None
    m.work()
    assert m.failed
    assert len(m.said) == n  # type: ignore[attr-defined]
    m.copy_all()


def test_waits_grow_to_a_limit():
    m = Mirror.__new__(Mirror)
    m.lease = None  # type: ignore[assignment]
    m.store = type("S", (), {"patience": tiny_patience()})()  # type: ignore[assignment]
    assert [m.wait_seconds(n) for n in (1, 2, 3, 7, 100)] == [1, 2, 4, 60, 60]


def tiny_patience():
    from regpt.data.download import Patience

    return Patience()


@pytest.mark.parametrize("last", ["env.json", "model.safetensors", "tokenizer.json"])
def test_a_holder_that_lost_its_lease_changes_nothing_from_then_on(run, saved, url, last):
    add(run, saved, 1)
    m, others = mirror(run, url), []

    def before(kind: str, name: str) -> None:
        if name.endswith(last):  # this file is on its way; the next one must not be, the manifest neither
            other = Lease(FaultyStore(url))
            other.acquire(dead=DEAD)
            others.append(other)

    m.store.before = before  # type: ignore[attr-defined]
    m.start()
    m.finish()
    assert isinstance(m.failure, UserError)
    assert "was taken over by process" in str(m.failure)
    assert f"what this process trained is in {run}" in str(m.failure)
    assert journal(m)[-1][1].endswith(last)
    assert steps(url) == []
    with pytest.raises(LeaseLost):
        m.copy_all()
    others[0].check()


@pytest.mark.parametrize("action", ["drop", "set aside", "gone"])
def test_a_holder_that_lost_its_lease_deletes_nothing(run, saved, url, action):
    folder = add(run, saved, 1)
    m = mirror(run, url)
    m.copy_all()
    other = Lease(FaultyStore(url))
    other.acquire(dead=DEAD)
    before = journal(m)
    (run / "env.json").unlink()
    with pytest.raises(LeaseLost):
        m.drop(folder.name) if action == "drop" else m.set_aside(folder.name) if action == "set aside" else m.copy_all()
    assert journal(m) == before


def test_a_checkpoint_that_was_saved_during_a_copy_has_its_rows_there_first(run, saved, url):
    add(run, saved, 1)

    def before(kind: str, name: str) -> None:
        if name.endswith("1/tokenizer.json"):  # training goes on
            (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
            add(run, saved, 2)

    m = mirror(run, url)
    m.store.before = before  # type: ignore[attr-defined]
    m.copy_all()
    names = [name for _, name in journal(m)]
    assert names.count("metrics.jsonl") == 2
    later = len(names) - names[::-1].index("metrics.jsonl") - 1
    assert later < names.index("checkpoints/step-00000002/manifest.json")


def test_the_thread_copies_what_it_is_told_of_and_releases_the_lease_at_the_end(run, saved, url):
    m = mirror(run, url)
    m.start()
    add(run, saved, 1)
    m.notify()
    add(run, saved, 2)
    assert m.finish()
    assert m.failure is None
    assert steps(url) == ["step-00000001", "step-00000002"]
    newest = m.lease.newest()
    assert newest is not None
    assert newest.released


def test_a_damaged_checkpoint_of_the_store_is_set_aside_not_deleted(run, saved, url, tmp_path):
    for step in (1, 2):
        add(run, saved, step)
    m = mirror(run, url)
    m.copy_all()
    part = "checkpoints/step-00000002/model.safetensors"
    data = bytearray(m.store.read(part) or b"")
    data[-1] ^= 1
    m.store.write(part, bytes(data))
    other, said = tmp_path / "other", []
    other.mkdir()
    damaged = restore(m.store, other, said.append)
    assert damaged == ["step-00000002"]
    assert "skipped memory://bucket/runs/a/checkpoints/step-00000002:" in said[0]
    assert "SHA-256" in said[0]
    assert newest_checkpoint(other).name == "step-00000001"
    again = mirror(other, url, keep_last=1)
    again.damaged = set(damaged)
    again.copy_all()
    assert steps(url) == ["step-00000001", "step-00000002"]  # not counted, not deleted
    add(other, saved, 2)  # trained again: bitwise what it was
    again.copy_all()
    assert steps(url) == ["step-00000002", "step-00000002.damaged-1"]
    assert again.store.read(part.replace("2/", "2.damaged-1/")) == bytes(data)
    assert newest_step(url, tmp_path / "third") == 2
