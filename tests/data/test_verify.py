"""Damage is found and the file named."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from regpt.data.manifest import read_manifest
from regpt.data.verify import verify, verify_small
from regpt.errors import UserError
from regpt.prepare.prepare import prepare
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
TEXTS = [f"the cat {i} sat on the mat" for i in range(30)]


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    prepare([str(source)], tmp_path / "out", TOKENIZER, val_fraction=0.2, shard_tokens=50)
    return tmp_path / "out"


def rewrite(folder: Path, name: str, values: np.ndarray) -> None:
    """Replace a file and make the manifest agree, as a tool that writes a wrong format would."""
    (folder / name).write_bytes(values.tobytes())
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    manifest = read_manifest(folder)
    key = {"bin": "sha256", "idx": "idx_sha256"}[name[-3:]]
    shards = tuple(
        dataclasses.replace(shard, **{key: digest}) if name in (shard.file, shard.idx_file) else shard
        for shard in manifest.shards
    )
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, shards=shards).to_json(), encoding="utf-8")


def test_an_intact_folder_has_no_damage_and_every_shard_is_read(folder):
    read: list[str] = []
    assert verify(folder, read.append) == []
    assert read == [shard.file for shard in read_manifest(folder).shards]


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx", "val-00000.bin", "tokenizer.json"])
def test_one_changed_bit_is_found_in_any_file(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[3] ^= 1
    (folder / name).write_bytes(data)
    assert verify(folder) == [f"{folder / name} is damaged: its SHA-256 is not the manifest's"]


IMPOSSIBLE = [-1, 10**12, 10**40, 1.5, 300.0, True, "300", None, [], {}]


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=repr)
@pytest.mark.parametrize("key", ["vocab_size", "eot", "tokens", "documents", "text_bytes", "removed"])
def test_an_impossible_number_in_a_manifest_is_refused_where_it_is_read(folder, key, value):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    spoiled = {"text_bytes": {"train": value}, "removed": {"empty": {"train": value}}}.get(key, value)
    (manifest["shards"][0] if key in ("tokens", "documents") else manifest)[key] = spoiled
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    if key in ("text_bytes", "removed") and value == 10**12:
        return
    with pytest.raises(UserError, match=r"manifest\.json (is not a manifest|has eot)|shard .* has .* bytes instead of"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name", ["../train-00000.bin", "/etc/passwd", "a/b.bin", "", "a\0.bin", "train-00000.txt", "a" * 5000]
)
def test_a_shard_that_is_no_file_of_the_folder_is_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json names the shard"):
        read_manifest(folder)


DEEP = "[" * 200_000


@pytest.mark.parametrize("text", [DEEP, f'{{"sources":[{DEEP}', "[" + "[]," * 3_000_000 + "1]", "\xff", "3"], ids=len)
def test_a_manifest_that_is_a_bomb_or_none_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of token shards"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx", "val-00000.bin"])
def test_small_shards_are_compared_before_a_run_and_large_ones_are_not(folder, name):
    manifest, data = read_manifest(folder), bytearray((folder / name).read_bytes())
    total = sum(path.stat().st_size for kind in ("*.bin", "*.idx") for path in folder.glob(kind))
    assert verify_small(folder, manifest) == verify_small(folder, manifest, total) == total
    data[3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: its SHA-256 is not the manifest's; restore the file"):
        verify_small(folder, manifest)
    assert verify_small(folder, manifest, total - 1) is None


@pytest.mark.parametrize("name", ["train-00001.bin", "val-00000.idx"])
def test_a_truncated_or_missing_file_is_named_before_anything_is_read(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{name} has .* bytes instead of"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_manifest(folder)


def test_the_format_is_checked_even_where_the_hashes_agree(folder):
    tokens = np.fromfile(folder / "train-00000.bin", dtype="<u2")
    starts = np.fromfile(folder / "train-00000.idx", dtype="<i8")
    wrong_tokens = {
        "document does not start with token 269": np.where(tokens == 269, 5, tokens),
        "token 269 occurs": np.where(np.arange(len(tokens)) == 1, 269, tokens),
        "token 300 is not in the vocabulary of 270": np.where(np.arange(len(tokens)) == 2, 300, tokens),
    }
    for said, wrong in wrong_tokens.items():
        rewrite(folder, "train-00000.bin", wrong.astype("<u2"))
        assert [damage for damage in verify(folder) if said in damage and "train-00000.bin" in damage], said
    rewrite(folder, "train-00000.bin", tokens)
    for said, wrong in {
        "do not increase": starts[::-1],
        "starts no document": starts + 1,
        "lies outside": starts * 1000,
    }.items():
        rewrite(folder, "train-00000.idx", wrong.astype("<i8"))
        assert [damage for damage in verify(folder) if said in damage and "train-00000.idx" in damage], said


def test_a_missing_continuation_or_tokenizer_is_damage(folder):
    (folder / "tokenizer.json").unlink()
    manifest = read_manifest(folder)
    *rest, last = manifest.shards
    broken = dataclasses.replace(manifest, shards=(*rest, dataclasses.replace(last, continues=True)))
    (folder / "manifest.json").write_text(broken.to_json(), encoding="utf-8")
    damage = verify(folder)
    assert damage[0] == f"{folder / 'tokenizer.json'} is missing"
    assert "the last val shard continues" in damage[1]


def test_every_damaged_file_is_named_whatever_its_damage(folder):
    (folder / "train-00000.bin").unlink()
    (folder / "train-00001.idx").write_bytes(b"")
    data = bytearray((folder / "val-00000.bin").read_bytes())
    data[3] ^= 1
    (folder / "val-00000.bin").write_bytes(data)
    damage = verify(folder)
    assert [sentence.split()[1 if sentence.startswith("shard") else 0] for sentence in damage] == [
        str(folder / name) for name in ("train-00000.bin", "train-00001.idx", "val-00000.bin")
    ]
    with pytest.raises(UserError, match=r"train-00000\.bin is missing \(2 files are wrong; .* names all"):
        read_manifest(folder)


def test_shards_of_a_folder_of_texts_are_made_elsewhere(tmp_path):
    (tmp_path / "a.txt").write_text("the cat", encoding="utf-8")
    with pytest.raises(UserError, match=r"no token shards.*: regpt data prepare (\S+) --out \1-shards$"):
        read_manifest(tmp_path)
