"""Files crafted as a checkpoint, with a manifest that agrees with them: refused with one sentence, nothing executed.

What differs from the manifest is in test_checkpoint.py: here size and SHA-256 are always right.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint, newest_checkpoint, verify_checkpoint
from regpt.checkpoint.manifest import write_manifest
from regpt.checkpoint.open import open_model
from regpt.checkpoint.state import NUMPY, encode
from regpt.errors import UserError
from regpt.hf.export import export_hf
from regpt.runs.pretrain import pretrain
from regpt.structured import read_object

WEIGHTS, OPTIMIZER, STATE, MODEL = "model.safetensors", "optimizer.safetensors", "state.json", "model.json"


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of two steps with checkpoints of both; read only."""
    config = tiny.change(tiny.run_config(shards), "train", steps=2, ema_decay=0.9, deterministic=True)
    run = tmp_path_factory.mktemp("trained") / "run"
    assert pretrain(tiny.change(config, "checkpoint", every_steps=1), run) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def folder(run) -> Path:
    """The newest checkpoint of `run`, to be spoiled."""
    return checkpoint_folder(run, 2)


class Executed:
    """What a pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def tensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    return json.dumps({k: {"dtype": d, "shape": s, "data_offsets": o} for k, (d, s, o) in tensors.items()}).encode()


ONE = b'"wte.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DEEP = b"[" * 200_000 + b"]" * 200_000
FILES = {
    "a pickle": pickle.dumps(Executed()),
    "torch's own format": b"PK\x03\x04" + bytes(60),
    "nothing": b"",
    "a header of 4 EiB": tensors_file(b"{}", length=1 << 62),
    "a header longer than the file": tensors_file(b"{}", length=90_000_000),
    "overlapping tensors": tensors_file(header(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), bytes(12)),
    "one place for two tensors": tensors_file(header(a=("F32", [1], [0, 4]), b=("F32", [1], [0, 4])), bytes(4)),
    "a tensor beyond the file": tensors_file(header(a=("F32", [20], [0, 80])), bytes(4)),
    "a tensor of another size than its place": tensors_file(header(a=("F32", [3], [0, 4])), bytes(4)),
    "a shape of 2^64 numbers": tensors_file(header(a=("F32", [1 << 62, 4], [0, 4])), bytes(4)),
    "a negative shape": tensors_file(header(a=("F32", [-1], [0, 4])), bytes(4)),
    "a type that does not exist": tensors_file(header(a=("PY", [1], [0, 4])), bytes(4)),
    "a pit of brackets": tensors_file(b'{"a":' + DEEP + b"}"),
    "a gigantic number": tensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 9000 + b"]}}"),
    "a name twice": tensors_file(b"{" + ONE + b"," + ONE + b"}", bytes(4)),
}


def write(folder: Path, name: str, content: bytes | str) -> None:
    """Put `content` into the checkpoint, and a manifest over all of it that is right."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def edit(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    write(folder, name, json.dumps(content))


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command line says: one sentence, exit code 1 or 2, warnings before it."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) in (1, 2)
    *warnings, said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("regpt: warning: skipped step-") for line in warnings)
    assert said.startswith("regpt: ")
    assert "raceback" not in said
    return "\n".join([*warnings, said])


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_file_that_is_no_safetensors_is_refused_by_name(folder, name, kind):
    write(folder, name, FILES[kind])
    with pytest.raises(UserError, match=rf"cannot read .*{name}' as safetensors|is twice in .*{name}'"):
        verify_checkpoint(folder)
    assert newest_checkpoint(folder.parents[1], warn=lambda message: None) == checkpoint_folder(folder.parents[1], 1)


@pytest.mark.parametrize("kind", ["a pickle", "a header of 4 EiB", "a name twice"])
def test_the_command_line_refuses_it_with_one_sentence(run, folder, capsys, kind):
    shutil.rmtree(checkpoint_folder(run, 1))
    write(folder, WEIGHTS, FILES[kind])
    assert WEIGHTS in refused(capsys, "sample", folder, "--prompt", "ba")
    assert WEIGHTS in refused(capsys, "sample", run, "--prompt", "ba")
    said = refused(capsys, "train", "--resume", run)
    assert WEIGHTS in said
    assert "none of its 1 checkpoints is intact" in said
    assert WEIGHTS in refused(capsys, "train", "--fork-from", folder, "--out", run.with_name("fork"))
    assert [path.name for path in checkpoints(run)] == [folder.name]  # kept


def test_a_pickle_beside_the_tensors_is_never_opened(folder):
    write(folder, "optimizer.bin", FILES["a pickle"])
    write(folder, "training_args.pt", FILES["a pickle"])
    load_checkpoint(folder)


@pytest.mark.parametrize("kind", ["a header of 4 EiB", "a header longer than the file"])
def test_a_huge_header_takes_no_memory(folder, kind):
    write(folder, WEIGHTS, FILES[kind])
    tracemalloc.start()
    with pytest.raises(UserError):
        verify_checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000  # bytes at once; the smaller header would be 90 MB
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "ema.safetensors"])
def test_another_type_is_refused_by_the_name_of_the_tensor(folder, name, dtype):
    tensors = load_file(folder / name)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].to(dtype)}, folder / name)
    write(folder, name, (folder / name).read_bytes())
    with pytest.raises(
        UserError, match=rf"tensor '{first}' in .*{name}' has type .*, (must be F32 or F64 or BF16|others F32)"
    ):
        verify_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "ema.safetensors"])
def test_numbers_that_are_not_finite_are_refused(run, folder, capsys, name, value):
    tensors = load_file(folder / name)
    save_file({key: torch.full_like(tensor, value) for key, tensor in tensors.items()}, folder / name)
    write(folder, name, (folder / name).read_bytes())
    with pytest.raises(UserError, match=rf"{name}' holds numbers in '.*' that are not finite"):
        verify_checkpoint(folder)
    shutil.rmtree(checkpoint_folder(run, 1))
    assert "not finite" in refused(capsys, "train", "--resume", run)


@pytest.mark.parametrize("change", ["shape", "missing"])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_another_shape_or_a_missing_tensor_is_refused(run, folder, capsys, name, change):
    tensors = load_file(folder / name)
    first = next(key for key in tensors if key.endswith("ln_f.bias"))
    tensors[first] = torch.zeros(tensors[first].numel() + 1)
    if change == "missing":
        del tensors[first]
    save_file(tensors, folder / name)
    write(folder, name, (folder / name).read_bytes())
    shutil.rmtree(checkpoint_folder(run, 1))
    assert first in refused(capsys, "train", "--resume", run)


def test_a_hugging_face_folder_that_asks_for_more_than_it_has_is_refused_before_memory_is_taken(
    folder, capsys, tmp_path
):
    opened = open_model(str(folder))
    exported = export_hf(opened.model, opened.tokenizer, tmp_path / "hf")
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    fewer = "has fewer weights than its config.json asks for"
    for change, sentence in (
        ({"n_layer": 4000}, fewer),
        ({"n_embd": 1 << 20}, "n_embd = 1048576, but tensor 'transformer.wte.weight' has shape"),
        ({"n_positions": 1 << 24}, "n_positions = 16777216, but tensor 'transformer.wpe.weight' has shape"),
        ({"vocab_size": 1 << 24}, "vocabulary"),
    ):
        (exported / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        assert sentence in refused(capsys, "sample", exported, "--prompt", "ba")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("n_layer", 4000), ("n_layer", 10**12), ("n_layer", 10**400), ("n_layer", True), ("n_layer", "2")],
        *[
            ("vocab_size", 299),
            ("vocab_size", 1 << 24),
            ("max_seq_len", 10**18),
            ("n_embd", 1 << 24),
            ("n_head", 10**9),
        ],
    ],
)
def test_a_shape_that_the_tensors_have_not_is_refused_before_memory_is_taken(folder, capsys, key, value):
    edit(folder, MODEL, lambda content: content.update({key: value}))
    with pytest.raises(
        UserError,
        match=r"model\.json' (asks for|does not describe a model|is not JSON)|tokenizer\.json' has 300 tokens",
    ):
        verify_checkpoint(folder)
    assert "json" in refused(capsys, "sample", folder, "--prompt", "ba")


@pytest.mark.parametrize("name", [STATE, MODEL, "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize(
    "content", [DEEP, b'{"a":' + DEEP + b"}", b'{"step":1' + b"0" * 9000 + b"}", b"\xff\xfe", b"3"]
)
def test_json_that_is_a_bomb_or_none_is_refused(run, folder, capsys, name, content):
    if name == "manifest.json":
        (folder / name).write_bytes(content)
    else:
        write(folder, name, content)
    with pytest.raises(UserError, match=name):
        verify_checkpoint(folder)
    assert name in refused(capsys, "sample", folder, "--prompt", "ba")
    shutil.rmtree(checkpoint_folder(run, 1))
    assert name in refused(capsys, "train", "--resume", run)


def test_a_json_file_that_is_too_large_is_not_read(folder):
    for name in ("manifest.json", STATE):
        with (folder / name).open("rb+") as file:
            file.truncate(100 << 20)
    with pytest.raises(UserError, match=r"manifest\.json' has more than 64 MiB"):
        verify_checkpoint(folder)
    (folder / "manifest.json").unlink()
    content = [{"file": path.name, "size": path.stat().st_size, "sha256": "0" * 64} for path in folder.iterdir()]
    (folder / "manifest.json").write_text(json.dumps({"files": content, "format_version": 1}), encoding="utf-8")
    with pytest.raises(UserError, match=r"state\.json' has 104,857,600 bytes, more than"):
        verify_checkpoint(folder)


PLACES = [
    "../state.json",
    "/etc/passwd",
    "C:\\x",
    "C:x",
    "a/b",
    "a\\b",
    "\\\\host\\share",
    "..",
    ".",
    "",
    "x\0y",
    "NUL:",
]


@pytest.mark.parametrize("name", PLACES)
def test_names_that_lead_elsewhere_are_refused_by_every_command(run, folder, capsys, name):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder.parent / "state.json").write_bytes((folder / STATE).read_bytes())  # where ../state.json leads
    manifest["files"].append({"file": name, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="which is no plain file name"):
        verify_checkpoint(folder)
    assert "no plain file name" in refused(capsys, "sample", folder, "--prompt", "ba")
    shutil.rmtree(checkpoint_folder(run, 1))
    assert "no plain file name" in refused(capsys, "train", "--resume", run)


def test_an_index_is_not_followed(folder):
    """Which files hold tensors says the manifest alone."""
    index = {"metadata": {}, "weight_map": {"wte.weight": "../../../secret.safetensors"}}
    write(folder, "model.safetensors.index.json", json.dumps(index))
    assert load_checkpoint(folder).weights()["wte.weight"].shape == (300, 16)


def test_symbolic_links_are_refused_whatever_they_point_at(run, folder, tmp_path):
    real = folder / "manifest.json"
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    real.unlink()
    real.symlink_to(elsewhere / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json' is a symbolic link"):
        verify_checkpoint(folder)
    real.unlink()
    (folder / "sub").symlink_to(elsewhere)
    write_a_manifest_with(folder, "sub")
    with pytest.raises(UserError, match=r"sub' is a symbolic link"):
        verify_checkpoint(folder)
    (folder / "sub").unlink()
    (folder / "sub").mkdir()
    with pytest.raises(UserError, match=r"sub' is missing"):
        verify_checkpoint(folder)
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    assert checkpoints(run) == [checkpoint_folder(run, 1)]


def write_a_manifest_with(folder: Path, name: str) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    content = [
        {"file": path.name, "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    ]
    content.append({"file": name, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()})
    (folder / "manifest.json").write_text(json.dumps({"files": content, "format_version": 1}), encoding="utf-8")


STATES = {
    "step": lambda s: s.update(step=-1),
    "a gigantic step": lambda s: s.update(step=10**300),
    "a row that no file has": lambda s: s["data"].update(next_row=1 << 63),
    "no length": lambda s: s["data"].update(seq_len=-5),
    "a key": lambda s: s.update(command="rm"),
    "a list": lambda s: s.update(trainer=[]),
    "rows": lambda s: s["trainer"].update(micro_batch_rows=0),
    "rows of text": lambda s: s["trainer"].update(micro_batch_rows="1"),
    "threads": lambda s: s["trainer"].update(threads=10**9),
    "losses": lambda s: s["trainer"]["guard"].update(losses=["x"]),
    "a guard": lambda s: s["trainer"].update(guard=[1]),
    "NaN": lambda s: s["trainer"]["guard"].update(losses=[float("nan")]),
    "no generators": lambda s: s.update(random=[{}]),
    "a position beyond NumPy's words": lambda s: s["random"][0].update(
        numpy=encode(struct.pack(NUMPY, *[1] * 624, 10**9, 0, 0.0))
    ),
    "a section": lambda s: s.update(config={"model": {"n_layer": "x"}}),
    "steps of text": lambda s: s["config"]["train"].update(steps="x"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_cannot_be_is_refused(run, folder, capsys, kind):
    edit(folder, STATE, STATES[kind])
    shutil.rmtree(checkpoint_folder(run, 1))
    assert "checkpoint" in refused(capsys, "train", "--resume", run)


def test_a_file_that_is_not_there_is_said_to_be_missing_not_to_be_no_json(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read '.*state\.json' \(No such file or directory\); restore"):
        read_object(tmp_path / STATE, "restore it")
