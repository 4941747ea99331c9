"""Tensors in one file or several: the same tensors come back, and nothing else is accepted."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from regpt.errors import UserError
from regpt.tensors import TensorFiles, find_divided, write_divided, write_tensors

TENSORS = {"a": torch.arange(10.0), "b": torch.ones(3, 4), "c": torch.zeros(100), "d": torch.full((2,), 7.0)}


def test_small_tensors_are_one_file_without_an_index(tmp_path):
    write_divided(tmp_path, "model", TENSORS, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("max_bytes", "files"), [(96, 3), (1, 4), (490, 2)])
def test_large_tensors_are_several_files_with_an_index_that_names_each(tmp_path, max_bytes, files):
    write_divided(tmp_path, "model", TENSORS, max_bytes)
    parts = find_divided(tmp_path, "model")
    assert [path.name for path in parts] == [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    assert all(path.stat().st_size < max_bytes + 400 or len(load_file(path)) == 1 for path in parts)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    read = TensorFiles(parts)
    assert list(read) == list(TENSORS) == list(index["weight_map"])
    for name, tensor in TENSORS.items():
        assert read[name].equal(tensor)
        assert load_file(tmp_path / index["weight_map"][name])[name].equal(tensor)


def test_no_tensors_are_one_file_without_any(tmp_path):
    write_divided(tmp_path, "optimizer", {}, 1)
    assert dict(TensorFiles(find_divided(tmp_path, "optimizer"))) == {}


@pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")
def test_tensors_may_be_read_by_whom_other_files_may_be_read(tmp_path):
    (tmp_path / "other").write_text("")
    write_tensors(tmp_path / "a", {"x": torch.ones(2)})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_files_that_refuse_what_is_no_safetensors_and_names_held_twice(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(2).t()})
    shutil.copy(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="tensor 'x' is in both"):
        TensorFiles([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b").write_bytes(b"PK\x03\x04 a pickle, perhaps")
    with pytest.raises(UserError, match="as safetensors"):
        TensorFiles([tmp_path / "b"])
    with pytest.raises(UserError, match="as safetensors"):
        TensorFiles([tmp_path / "nowhere"])


def test_a_type_that_was_not_asked_for_is_named(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.float16)})
    assert len(TensorFiles([tmp_path / "a"])) == 2
    with pytest.raises(UserError, match=r"tensor 'y' in .*a' has type F16, must be F32 or F64"):
        TensorFiles([tmp_path / "a"], ("F32", "F64"))
