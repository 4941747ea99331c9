"""A run folder copied to a store: in which order, what an interruption leaves, what is deleted when."""

import os
import shutil
from pathlib import Path

import pytest
from mirrors import FILES, add, journal, killed_everywhere, mirror, newest_step, steps

import tiny
from regpt.checkpoint.fetch import restore
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint, newest_checkpoint
from regpt.checkpoint.save import save_checkpoint
from remote_stores import FaultyStore

pytest.importorskip("fsspec")


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


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_copy_killed_at_any_file_leaves_a_run_to_go_on_with(run, saved, url, tmp_path, keep_last):
    for step in (1, 2):
        add(run, saved, step)
    mirror(run, url, keep_last).copy_all()
    before = FaultyStore(url).content()
    add(run, saved, 3)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    for seen in killed_everywhere(run, url, before, keep_last):
        complete = "step-00000003" in steps(url)
        assert newest_step(url, tmp_path / f"other-{seen}") == (3 if complete else 2)
        mirror(run, url, keep_last).copy_all()  # the next process tidies up
        assert steps(url) == ["step-00000002", "step-00000003"][-keep_last:]
        folders = {name.split("/")[1] for name in FaultyStore(url).files("checkpoints")}
        assert sorted(folders) == steps(url)
    assert seen > 10


def test_while_a_checkpoint_is_replaced_the_one_before_it_is_whole_there(run, saved, url, tmp_path):
    for step in (1, 2):
        add(run, saved, step)
    mirror(run, url).copy_all()
    before = FaultyStore(url).content()
    checkpoint = load_checkpoint(checkpoint_folder(run, 2))
    state = tiny.replace(checkpoint.state, average_updates=5)
    contents = tiny.Contents(
        checkpoint.config, checkpoint.tokenizer(), dict(checkpoint.weights()), dict(checkpoint.optimizer()), state
    )
    save_checkpoint(checkpoint.folder, contents)
    newest = []
    for seen in killed_everywhere(run, url, before, keep_last=2):
        newest.append(newest_step(url, tmp_path / f"other-{seen}"))
    assert set(newest) == {1, 2}
    found = load_checkpoint(newest_checkpoint(tmp_path / f"other-{seen}"))
    assert found.state.average_updates == 5
    assert steps(url) == ["step-00000001", "step-00000002"]


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
    m.store.before = lambda kind, name: seen.append(m.uploading == folder)  # type: ignore[attr-defined]
    m.copy_all()
    assert seen == [False] * 3 + [True] * len(FILES)
    assert m.uploading is None


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
    with pytest.raises(ConnectionError, match=r"model\.safetensors arrived with .* bytes, not all"):
        m.copy_all()
    assert steps(url) == []
    m.copy_all()
    assert steps(url) == ["step-00000001"]
    assert calls.count("checkpoints/step-00000001/state.json") == 1  # what had arrived is not sent again


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


def test_a_damaged_checkpoint_of_the_store_is_not_counted_and_stays_until_it_is_saved_again(run, saved, url, tmp_path):
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
    assert steps(url) == ["step-00000002"]
    assert newest_step(url, tmp_path / "third") == 2
