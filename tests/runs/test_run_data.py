"""What a run reads: mixtures, masks, orders, and its validation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from regpt.data.batch import IGNORE_INDEX
from regpt.data.manifest import read_manifest
from regpt.data.mixture import MixedRows
from regpt.errors import UsageError, UserError
from regpt.parallel.mesh import Mesh
from regpt.runs.build import build_loader, count_validation_rows, mask_token, open_corpus, validation_parts
from regpt.runs.pretrain import check, pretrain, resume
from regpt.runs.validation import part_batches

CPU = torch.device("cpu")


@pytest.fixture
def two_folders(shards: Path, tmp_path: Path) -> dict[str, float]:
    """Two folders of the same text, three parts to one."""
    return {str(shards): 0.75, str(shutil.copytree(shards, tmp_path / "second")): 0.25}


def mixed_config(two_folders: dict[str, float]):
    return tiny.change(tiny.run_config(Path()), "data", path="", mixture=two_folders)


def test_a_mixture_is_read_in_its_shares(two_folders):
    config = mixed_config(two_folders)
    corpus = open_corpus(config)
    rows = corpus.rows("train", "shuffle", 1337, 16)
    assert isinstance(rows, MixedRows)
    assert corpus.shares == (3, 1)
    assert np.bincount(rows.turns).tolist() == [3, 1]
    loader = build_loader(config, corpus, Mesh(0, 1, CPU))
    read = [count / part.epoch_rows(10**9) for count, part in zip((24, 8), rows.parts)]  # 8 steps of 64 tokens
    assert loader.epochs(8) == pytest.approx(read)


def test_a_flipped_bit_in_small_shards_is_found_before_a_run_and_large_ones_are_named(two_folders, monkeypatch, capsys):
    config = mixed_config(two_folders)
    check(config, None)
    assert capsys.readouterr().err == ""
    first, second = (Path(path) for path in two_folders)
    data = bytearray((second / "train-00000.bin").read_bytes())
    data[10] ^= 1
    (second / "train-00000.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"second/train-00000\.bin is damaged"):
        check(config, None)
    room = sum(path.stat().st_size for path in first.glob("*-0*"))
    monkeypatch.setattr("regpt.runs.build.SMALL_BYTES", room)
    check(config, None)
    assert capsys.readouterr().err.startswith(f"regpt: {second}: too large to be compared with its SHA-256 here")


def test_a_run_on_a_mixture_ends_with_its_epochs_and_can_be_repeated_and_resumed(two_folders, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    config = mixed_config(two_folders)
    assert pretrain(config, run) == 0
    (event,) = [row for row in tiny.rows_of(run, "event") if row["name"] == "epochs"]
    assert list(event["epochs"]) == [str(Path(path).resolve()) for path in two_folders]
    assert json.loads((run / "env.json").read_text())["data"]["path"].count(" + ") == 1
    shutil.copytree(run, again)
    for step in (6, 8):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    assert resume(again) == 0
    straight, resumed = ({row["step"]: row["loss"] for row in tiny.rows_of(r, "train")} for r in (run, again))
    assert resumed == pytest.approx(straight, rel=1e-6)


def test_validation_of_a_mixture_reads_no_split_twice(two_folders):
    config = tiny.change(mixed_config(two_folders), "eval", val_tokens=0)
    corpus = open_corpus(config)
    n_rows = count_validation_rows(config, corpus)
    rows = corpus.rows("val", "sequential", 0, 16)
    assert isinstance(rows, MixedRows)
    held_out = (corpus.folders[0].manifest.tokens("val") - 1) // 16
    assert rows.part_row(0, n_rows) <= held_out < rows.part_row(0, n_rows + 2)
    assert count_validation_rows(mixed_config(two_folders), corpus) == 3  # val_tokens 48


def test_folders_without_validation_take_no_part_in_it(two_folders):
    _, second = two_folders
    manifest = read_manifest(Path(second))
    train_only = replace(manifest, shards=tuple(manifest.split("train")))
    (Path(second) / "manifest.json").write_text(train_only.to_json(), encoding="utf-8")
    config = mixed_config(two_folders)
    corpus = open_corpus(config)
    rows = corpus.rows("val", "sequential", 0, 16)
    assert isinstance(rows, MixedRows)
    assert len(rows.parts) == 1
    assert count_validation_rows(config, corpus) == 3


@pytest.mark.parametrize("order", ["shuffle", "sequential", "bos"])
@pytest.mark.parametrize("mask", [False, True])
def test_every_order_trains_with_and_without_document_mask(shards, tmp_path, order, mask):
    config = tiny.change(tiny.run_config(shards), "data", order=order, document_mask=mask)
    assert pretrain(config, tmp_path / "run") == 0
    assert len(tiny.rows_of(tmp_path / "run", "train")) == 8


def test_validation_is_masked_like_training_and_ends_where_it_should(shards):
    config = tiny.change(tiny.run_config(shards), "data", document_mask=True)
    config = tiny.change(config, "train", micro_batch_rows=4)
    corpus = open_corpus(config)
    (part,) = validation_parts(config, corpus)
    (batch,) = part_batches(part, Mesh(0, 1, CPU), 4, mask_token(config, corpus))
    assert batch.positions is not None
    assert batch.cu_seqlens is not None
    assert (batch.targets[3] == IGNORE_INDEX).all()
    assert (batch.targets[:3] != IGNORE_INDEX).all()


def test_the_folders_of_a_mixture_must_share_a_tokenizer(two_folders):
    _, second = two_folders
    manifest = read_manifest(Path(second))
    other = replace(manifest, tokenizer="another", tokenizer_sha256="0")
    (Path(second) / "manifest.json").write_text(other.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"were made with another tokenizer \(another\) than those in .*prepare one"):
        open_corpus(mixed_config(two_folders))


def test_a_folder_may_be_named_once(shards):
    config = mixed_config({str(shards): 1.0, f"{shards}/../{shards.name}": 2.0})
    with pytest.raises(UsageError, match=r"names the same folder twice .*; add up its weights"):
        open_corpus(config)


def test_the_hash_of_the_data_changes_with_a_weight(two_folders):
    one = open_corpus(mixed_config(two_folders)).manifest_sha256
    assert one == open_corpus(mixed_config(dict(two_folders))).manifest_sha256
    assert one != open_corpus(mixed_config(dict.fromkeys(two_folders, 1.0))).manifest_sha256
