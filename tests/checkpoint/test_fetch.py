"""Runs and models of a store, copied here: nothing damaged, nothing outside the folder, no more than is needed."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.fetch import fetch_model, folder_name, local_run, restore, split_address
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint
from regpt.checkpoint.open import open_model
from regpt.errors import UsageError, UserError
from regpt.remote import is_address
from regpt.remote.store import Store
from regpt.text.bpe import train_bpe
from remote_stores import FaultyStore, memory_bucket

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 1 and 2; read only."""
    run = tmp_path_factory.mktemp("saved") / "run"
    tokenizer = train_bpe(["ba do mi ta ru ke"], 257)
    model = tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=257)).float()
    for step in (1, 2):
        tiny.save_model(checkpoint_folder(run, step), model, tokenizer, step)
    (run / "config.toml").write_text("[train]\nsteps = 2\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    return run


@pytest.fixture
def store(saved, tmp_path, monkeypatch):
    """A store that holds the run, and a home folder for the copies."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with memory_bucket() as url:
        store = FaultyStore(url)
        for path in saved.rglob("*"):
            if path.is_file():
                store.put(path.relative_to(saved).as_posix(), path)
        yield store


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def crafted(manifest: bytes) -> bytes:
    """A manifest that names a file outside the folder."""
    return manifest.replace(b'"model.json"', b'"../../config.toml"')


def consistent_nan(store: Store, folder: str) -> None:
    """Weights that are not finite, with a manifest that says so."""
    data = (store.read(f"{folder}/model.safetensors") or b"")[:-4] + b"\x00\x00\xc0\x7f"
    manifest = json.loads(store.read(f"{folder}/manifest.json") or b"")
    for file in manifest["files"]:
        if file["file"] == "model.safetensors":
            file["sha256"] = hashlib.sha256(data).hexdigest()
    store.write(f"{folder}/model.safetensors", data)
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


DAMAGE = {
    "a flipped bit": (lambda s, f: change(s, f"{f}/optimizer.safetensors", flip), "SHA-256 differs"),
    "a truncated file": (
        lambda s, f: change(s, f"{f}/state.json", lambda data: data[:-1]),
        r"state\.json' has .* bytes instead of",
    ),
    "a missing file": (lambda s, f: s.remove(f"{f}/model.json"), r"model\.json' is missing"),
    "a torn manifest": (lambda s, f: change(s, f"{f}/manifest.json", lambda data: data[:50]), "is not a manifest"),
    "an empty manifest": (lambda s, f: s.write(f"{f}/manifest.json", b""), "is not a manifest"),
    "a huge manifest": (
        lambda s, f: s.write(f"{f}/manifest.json", b" " * ((64 << 20) + 1)),
        "has more than 64 MiB",
    ),
    "a path out of the folder": (lambda s, f: change(s, f"{f}/manifest.json", crafted), "is no plain file name"),
    "weights that are not finite": (consistent_nan, "not finite"),
}


def change(store: Store, name: str, by) -> None:
    store.write(name, by(store.read(name) or b""))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_skipped_and_kept(store, tmp_path, kind):
    damage, said = DAMAGE[kind]
    damage(store, "checkpoints/step-00000002")
    before, warned = store.content(), []
    run = tmp_path / "run"
    run.mkdir()
    assert restore(store, run, warned.append) == ["step-00000002"]
    (message,) = warned
    assert message.startswith(f"skipped {store.url}/checkpoints/step-00000002: ")
    assert re.search(said, message)
    assert str(tmp_path) not in message  # but its address
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert (run / "config.toml").read_text(encoding="utf-8") == "[train]\nsteps = 2\n"
    assert store.content() == before
    assert not list(tmp_path.glob("*.toml"))


def test_a_checkpoint_without_a_manifest_is_none(store, tmp_path):
    store.remove("checkpoints/step-00000002/manifest.json")
    run = tmp_path / "run"
    run.mkdir()
    assert restore(store, run, pytest.fail) == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_no_intact_checkpoint_is_one_sentence(store, tmp_path):
    for step in (1, 2):
        change(store, f"checkpoints/step-{step:08d}/model.safetensors", flip)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=r"run memory://.* cannot be opened, none of its 2 checkpoints is intact"):
        restore(store, run, lambda text: None)
    with pytest.raises(UserError, match=r"memory://.* cannot be opened, none of its 2 checkpoints is intact"):
        fetch_model(store.url, warn=lambda text: None)


def test_names_that_lead_out_of_the_folder_are_not_downloaded(store, tmp_path):
    for name in ("../outside.txt", "a/../../b.txt", "a\\b.txt", ".hidden", "c:/d.txt"):
        store.fs.store[f"{store.root}/{name}"] = store.fs.store[f"{store.root}/config.toml"]
    store.write("evals/val.jsonl", b"{}\n")
    run = tmp_path / "folder" / "run"
    run.mkdir(parents=True)
    restore(store, run)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in names if "checkpoints" not in name} == {
        f"folder/run/{name}" for name in ("config.toml", "metrics.jsonl", "evals/val.jsonl")
    }


def test_a_model_is_copied_once_without_the_optimizer(store, saved, monkeypatch):
    got: list[str] = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, name, path: got.append(name) or get(self, name, path))
    opened = open_model(store.url)
    assert opened.step == 2
    assert opened.source == f"{store.url}, step 2"
    expected = load_checkpoint(checkpoint_folder(saved, 2)).weights()
    assert all(
        tensor.equal(expected[name]) for name, tensor in opened.model.named_parameters() if name == "ln_f.weight"
    )
    assert "checkpoints/step-00000002/optimizer.safetensors" not in got
    tensors = [name for name in got if "safetensors" in name]
    folder = fetch_model(store.url)
    assert [name for name in got if "safetensors" in name] == tensors
    assert folder.parts[-3:] == ("a", "checkpoints", "step-00000002")
    with pytest.raises(UserError, match=r"optimizer\.safetensors' is missing"):
        load_checkpoint(folder)
    load_checkpoint(fetch_model(store.url, optimizer=True))
    assert "checkpoints/step-00000002/optimizer.safetensors" in got
    assert open_model(f"{store.url}/checkpoints/step-00000001").step == 1


def test_a_checkpoint_that_was_replaced_there_is_copied_again(store):
    fetch_model(store.url)
    for part in list(store.files("checkpoints/step-00000002")):
        store.write(part, store.read(part.replace("2/", "1/")) or b"")
    assert open_model(store.url).step == 1  # what lies there now


def test_a_checkpoint_deleted_while_it_is_copied_is_replaced_by_the_newer_one(store, saved, monkeypatch):
    for part in list(store.files("checkpoints/step-00000002")):
        store.remove(part)
    get = Store.get

    def pruned(self: Store, name: str, path: Path) -> bool:
        if name == "checkpoints/step-00000001/model.safetensors":  # the run goes on meanwhile
            for file in checkpoint_folder(saved, 2).iterdir():
                self.write(f"checkpoints/step-00000002/{file.name}", file.read_bytes())
            for part in self.files("checkpoints/step-00000001"):
                self.remove(part)
        return get(self, name, path)

    monkeypatch.setattr(Store, "get", pruned)
    said: list[str] = []
    assert fetch_model(store.url, warn=said.append).name == "step-00000002"
    assert len(said) == 1


def test_a_copy_of_a_run_has_what_is_there_now(store):
    store.write("evals/val-step-00000001.jsonl", b"{}\n")
    run = local_run(store.url)
    assert run.name == "a"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names == {"config.toml", "metrics.jsonl", "evals/val-step-00000001.jsonl"}
    store.remove("evals/val-step-00000001.jsonl")
    store.write("metrics.jsonl", b'{"step": 9}\n')
    fetch_model(store.url)
    assert not list((local_run(store.url) / "evals").glob("*"))
    assert (run / "metrics.jsonl").read_bytes() == b'{"step": 9}\n'
    assert fetch_model(store.url).is_dir()


@pytest.mark.parametrize("address", ["memory://bucket/nothing", "memory://bucket/nothing/checkpoints/step-00000001"])
def test_an_address_without_a_run_is_one_sentence(store, address):
    with pytest.raises(UserError, match=rf"{address} cannot be opened"):
        fetch_model(address, warn=lambda text: None)
    with pytest.raises(UserError, match=rf"{address} holds no run \(no config\.toml\)"):
        local_run(address)


def test_an_address_of_an_unknown_kind_is_one_sentence():
    with pytest.raises(UsageError, match=r"what://a/b is an address of an unknown kind; give s3://"):
        Store("what://a/b")
    with pytest.raises(UsageError, match="https://a/b is an address that runs are not kept at"):
        Store("https://a/b")


def test_addresses_are_told_from_paths():
    assert [is_address(name) for name in ("s3://b/a", "gs://b", "file:///a", "abfs+x://a/b")] == [True] * 4
    assert not any(map(is_address, ("runs/a", "C:\\runs\\a", "C://runs", "gpt2", "a/b://c", "://a", "")))
    assert split_address("s3://b/a/checkpoints/step-00000002/") == ("s3://b/a", "step-00000002")
    assert split_address("s3://b/a/checkpoints") == ("s3://b/a/checkpoints", "")
    assert split_address("s3://b/a/") == ("s3://b/a", "")


def test_folders_of_different_addresses_differ():
    names = [
        folder_name(url) for url in ("s3://b/runs/a", "gs://b/runs/a", "s3://b/x/runs/a", "s3://b/runs-a", "s3://b")
    ]
    assert len(set(names)) == len(names)
    assert folder_name("s3://b/runs/a/") == folder_name("s3://b/runs/a")
    assert all(name.startswith("runs-a-") for name in names[:3])


def test_a_local_store_never_shows_half_a_file(tmp_path, monkeypatch):
    store = Store((tmp_path / "store").as_uri())
    store.write("a/b.txt", b"one")

    def torn(source: str, place: str) -> None:
        raise OSError("killed before the rename")

    monkeypatch.setattr("os.replace", torn)
    with pytest.raises(OSError, match="killed"):
        store.write("a/b.txt", b"two two")
    with pytest.raises(OSError, match="killed"):
        store.put("a/c.txt", tmp_path / "store" / "a" / "b.txt")
    assert store.files() == {"a/b.txt": 3}
    shutil.rmtree(tmp_path / "store")
    assert store.files() == {}
    assert store.read("a/b.txt") is None


def test_a_local_store_keeps_no_empty_folders(tmp_path):
    store = Store((tmp_path / "store").as_uri())
    for name in ("a/b.txt", "a/c.txt"):
        store.write(name, b"one")
    store.remove("a/b.txt")
    store.remove("a/b.txt")
    assert (tmp_path / "store" / "a" / "c.txt").is_file()
    store.remove("a/c.txt")
    assert not (tmp_path / "store" / "a").exists()
