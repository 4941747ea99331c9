"""Checkpoints: what goes in comes out bit for bit, nothing half-written is seen, nothing damaged is read."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import regpt.checkpoint.save
import regpt.files
import regpt.tensors
from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoints, load_checkpoint, newest_checkpoint, verify_checkpoint
from regpt.checkpoint.saver import Saver
from regpt.errors import UserError
from regpt.files import whole_folder
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import load_weights, state_tensors

FILES = ["manifest.json", "model.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, save, contents, model, optimizer, tokenizer):
    folder = save(tmp_path, 250)
    assert folder == tmp_path / "checkpoints" / "step-00000250"
    assert names(folder) == FILES
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == model.config
    assert checkpoint.state == contents(250).state
    assert checkpoint.step == 250
    assert checkpoint.tokenizer().sha256 == tokenizer.sha256
    for stored, expected in ((checkpoint.weights(), state_tensors(model)), (checkpoint.optimizer(), optimizer)):
        assert stored.keys() == expected.keys()
        assert len(stored) == len(expected)
        assert all(stored[name].equal(tensor) for name, tensor in expected.items())


def test_padding_rows_are_not_stored_and_come_back_as_zeros(tmp_path, save, model):
    weights = load_checkpoint(save(tmp_path, 1)).weights()
    assert model.wte.weight.size(0) == 384
    assert weights["wte.weight"].size(0) == 263
    assert "lm_head.weight" not in weights
    loaded = load_weights(make_model(model.config), weights)
    assert loaded.wte.weight.equal(model.wte.weight)
    unpadded = load_weights(make_model(model.config, pad_vocab=False), weights)
    assert unpadded.wte.weight.equal(model.wte.weight[:263])


def test_a_checkpoint_can_be_copied_elsewhere(tmp_path, save):
    copy = tmp_path / "elsewhere"
    shutil.copytree(save(tmp_path / "run", 250), copy)
    assert load_checkpoint(copy).step == 250


@pytest.mark.skipif(os.name != "posix", reason="Windows does not flush folders")
def test_every_new_name_reaches_the_disk_before_the_next_step(tmp_path, save, monkeypatch):
    flushed, real = [], regpt.files.sync
    monkeypatch.setattr(regpt.files, "sync", lambda path: (flushed.append(Path(path)), real(path))[0])
    run = tmp_path / "deep" / "run"
    save(run, 1)
    temporary = [path for path in flushed if path.name.startswith(".step-00000001.tmp-")]
    assert set(flushed) == {tmp_path, tmp_path / "deep", run, *temporary, run / "checkpoints"}
    assert flushed[-2:] == [temporary[-1], run / "checkpoints"]  # the files' names, then the checkpoint's own


def test_a_checkpoint_of_several_files_comes_back_bit_for_bit(tmp_path, save, contents):
    checkpoint = load_checkpoint(save(tmp_path, 5, max_file_bytes=4000))
    assert len(checkpoint.manifest.tensor_files("model")) > 2
    assert len(checkpoint.manifest.tensor_files("optimizer")) > 4
    for stored, expected in (
        (checkpoint.weights(), contents(5).weights),
        (checkpoint.optimizer(), contents(5).optimizer),
    ):
        assert stored.keys() == expected.keys()
        assert all(stored[name].equal(tensor) for name, tensor in expected.items())


def test_a_checkpoint_without_optimizer_state_is_fine(tmp_path, contents):
    folder = regpt.checkpoint.save.save_checkpoint(tmp_path / "step-00000000", replace(contents(0), optimizer={}))
    assert dict(load_checkpoint(folder).optimizer()) == {}


def test_the_same_state_gives_the_same_bytes(tmp_path, save):
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


@pytest.mark.parametrize("dies_in", ["write_json", "write_divided", "write_state", "write_manifest"])
def test_a_save_that_dies_leaves_nothing_to_be_seen(tmp_path, save, monkeypatch, dies_in):
    save(tmp_path, 1)
    real = getattr(regpt.checkpoint.save, dies_in)

    def die(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(regpt.checkpoint.save, dies_in, die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["step-00000001"]


def test_what_a_killed_save_left_is_ignored_and_cleaned_by_the_next(tmp_path, save):
    folder = save(tmp_path, 1)
    leftover = folder.with_name(".step-00000002.tmp-12345678")
    shutil.copytree(folder, leftover)
    (leftover / "manifest.json").unlink()
    assert checkpoints(tmp_path) == [folder]
    assert newest_checkpoint(tmp_path) == folder
    save(tmp_path, 3)
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path, save, model):
    save(tmp_path, 1)
    with torch.no_grad():
        model.ln_f.bias.fill_(3)
    folder = save(tmp_path, 1)
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert load_checkpoint(folder).weights()["ln_f.bias"].eq(3).all()


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, save, monkeypatch):
    old = save(tmp_path, 1)

    def full(path, tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(regpt.tensors, "write_tensors", full)
    with pytest.raises(UserError, match=r"cannot write .*step-00000002.*No space left.*untouched"):
        save(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == [old.name]
    verify_checkpoint(old)


def test_a_place_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), whole_folder(tmp_path / "file" / "x"):
        pass


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_flipped_bit_is_found(tmp_path, save, name):
    folder = save(tmp_path, 1)
    flip(folder / name)
    with pytest.raises(UserError, match=rf"{name}' has been changed or damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_missing_truncated_or_linked_file_is_found(tmp_path, save, name):
    folder = save(tmp_path, 1)
    path, content = folder / name, (folder / name).read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name}' has [\d,]+ bytes instead of"):
        verify_checkpoint(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}' is missing"):
        verify_checkpoint(folder)
    (tmp_path / "original").write_bytes(content)
    path.symlink_to(tmp_path / "original")
    with pytest.raises(UserError, match=rf"{name}' is a symbolic link"):
        verify_checkpoint(folder)


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/b", "a\\b", "C:x", "..", ""])
def test_a_manifest_that_points_outside_the_folder_is_refused(tmp_path, save, name):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda manifest: manifest["files"][0].update(file=name))
    with pytest.raises(UserError, match=r"manifest\.json' names .*, which is no plain file name"):
        verify_checkpoint(folder)


def test_a_manifest_of_another_kind_is_refused(tmp_path, save):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda manifest: manifest["files"].pop(1))
    with pytest.raises(UserError, match=r"lacks 'model\.safetensors'"):
        verify_checkpoint(folder)
    edit_manifest(folder, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(UserError, match="format version 2, this regpt reads 1"):
        verify_checkpoint(folder)
    for text in ("", "{", "[]", '{"files": [{"file": 3}]}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json' is not a manifest"):
            verify_checkpoint(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        verify_checkpoint(folder)
    with pytest.raises(UserError, match="does not exist"):
        verify_checkpoint(tmp_path / "nowhere")


def test_a_reader_may_leave_the_optimizer_unhashed(tmp_path, save):
    folder = save(tmp_path, 1)
    flip(folder / "optimizer.safetensors")
    verify_checkpoint(folder, optimizer=False)
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        verify_checkpoint(folder)


def test_the_newest_intact_checkpoint_is_found_and_damaged_ones_are_named_and_kept(tmp_path, save, capsys):
    for step in (5, 10, 20, 100_000_000):
        save(tmp_path, step)
    steps = names(tmp_path / "checkpoints")
    assert newest_checkpoint(tmp_path).name == "step-100000000"
    flip(tmp_path / "checkpoints" / "step-100000000" / "model.safetensors")
    (tmp_path / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path).name == "step-00000010"
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split()[3] for line in warnings] == ["step-100000000:", "step-00000020:"]
    assert names(tmp_path / "checkpoints") == steps


def test_a_run_without_an_intact_checkpoint_is_one_sentence(tmp_path, save):
    with pytest.raises(UserError, match="it has no complete checkpoint"):
        newest_checkpoint(tmp_path)
    flip(save(tmp_path, 1) / "state.json")
    warnings = []
    with pytest.raises(UserError, match="none of its 1 checkpoints is intact"):
        newest_checkpoint(tmp_path, warn=warnings.append)
    assert len(warnings) == 1


def pruned(run, keep_last, keep_every):
    return Saver(run, CheckpointConfig(keep_last=keep_last, keep_every=keep_every)).prune()


def test_prune_keeps_the_newest_and_the_multiples(tmp_path, save):
    for step in (100, 150, 200, 250, 300):
        save(tmp_path, step)
    assert pruned(tmp_path, keep_last=0, keep_every=0) == []
    deleted = pruned(tmp_path, keep_last=2, keep_every=200)
    assert [folder.name for folder in deleted] == ["step-00000100", "step-00000150"]
    assert names(tmp_path / "checkpoints") == ["step-00000200", "step-00000250", "step-00000300"]
    assert pruned(tmp_path, keep_last=9, keep_every=0) == []


def test_prune_neither_counts_nor_deletes_a_damaged_checkpoint(tmp_path, save):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (1, 4):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "model.safetensors").write_bytes(b"")
    pruned(tmp_path, keep_last=1, keep_every=0)
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003", "step-00000004"]


def test_weights_of_another_shape_are_refused_by_name(tmp_path, save):
    weights = load_checkpoint(save(tmp_path, 1)).weights()
    wider = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=263, max_seq_len=37)
    with pytest.raises(UserError, match=r"'wte\.weight' has shape \(263, 27\).*this model needs \(263, 16\)"):
        load_weights(make_model(wider), weights)


def test_a_model_json_that_describes_no_model_is_refused(tmp_path, save, monkeypatch):
    folder = save(tmp_path, 1)
    for content, complaint in (
        ({"format_version": 9}, "format version 1"),
        ({"format_version": 1, "n_layer": "2"}, r"does not describe a model \(n_layer"),
        ({"format_version": 1, "n_head": 5}, "does not describe a model .*not divisible"),
        ({"format_version": 1, "n_haed": 5}, r"does not describe a model \(n_haed"),
    ):
        (folder / "model.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"model\.json' .*{complaint}"):
            load_checkpoint(folder, verified=True)
