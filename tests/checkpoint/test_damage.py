"""`regpt checkpoint list` and `verify`: what is there, and every file that is damaged, by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regpt.__main__ import main
from regpt.checkpoint.damage import find_damage, list_checkpoints
from regpt.checkpoint.load import checkpoint_folder, verify_checkpoint
from regpt.checkpoint.manifest import write_manifest
from regpt.errors import UserError

GOLDEN = Path(__file__).parents[1] / "goldens" / "run-1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints 4 and 6."""
    run = shutil.copytree(GOLDEN, tmp_path / "run")
    newer = shutil.copytree(checkpoint_folder(run, 4), checkpoint_folder(run, 6))
    state = json.loads((newer / "state.json").read_text(encoding="utf-8")) | {"step": 6}
    (newer / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (newer / "manifest.json").unlink()
    write_manifest(newer)
    return run


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["checkpoint", *map(str, args)])
    return code, *capsys.readouterr()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_list_has_steps_sizes_dates_and_what_is_no_checkpoint(run, capsys):
    newest = checkpoint_folder(run, 6)
    shutil.copytree(newest, newest.with_name("step-00000002.damaged-1"))
    newest.with_name(".step-00000008.tmp-0123abcd").mkdir()
    (newest / "ema.safetensors").write_bytes(b"")
    listed = {one.name: one for one in list_checkpoints(run)}
    assert [(one.step, one.kind) for one in listed.values()] == [
        (4, "checkpoint"),
        (6, "checkpoint"),
        (None, "unfinished"),
        (None, "set aside"),
    ]
    good = listed["step-00000004"]
    folder = checkpoint_folder(run, 4)
    assert good.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert good.written == max(path.stat().st_mtime for path in folder.iterdir())
    assert (good.average, good.problem) == (True, "")
    assert listed["step-00000006"].problem == "ema.safetensors has 0 bytes instead of 6,528"
    code, out, err = called(capsys, "list", run)
    assert (code, err) == (0, "")
    rows = out.splitlines()
    assert rows[1].split()[:2] == ["step-00000004", "4"]
    assert rows[1].endswith("51.1 kB  complete, with average")
    assert rows[2].endswith("incomplete: ema.safetensors has 0 bytes instead of 6,528")
    assert "being written, or left by a crash" in rows[3]
    assert "damaged, set aside" in rows[4]


def test_the_list_as_json(run, capsys):
    code, out, _ = called(capsys, "list", run, "--json")
    found = json.loads(out)
    assert (code, found["run"]) == (0, str(run))
    assert [(one["step"], one["problem"]) for one in found["checkpoints"]] == [(4, ""), (6, "")]


def test_an_intact_run_is_intact(run, capsys):
    code, out, err = called(capsys, "verify", run)
    assert (code, out.splitlines(), err) == (0, ["step-00000004  intact", "step-00000006  intact"], "")
    code, out, err = called(capsys, "verify", checkpoint_folder(run, 6))
    assert (code, out, err) == (0, "step-00000006  intact\n", "")


@pytest.mark.parametrize("name", sorted(path.name for path in checkpoint_folder(GOLDEN, 4).iterdir()))
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_each_damaged_file_is_named(run, capsys, name, damage):
    path = checkpoint_folder(run, 6) / name
    if damage == "flipped":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    code, out, err = called(capsys, "verify", run, "--json")
    found = json.loads(out)
    assert (code, err, found["intact"]) == (1, "", False)
    good, bad = found["checkpoints"]
    assert (good["name"], good["intact"], good["damage"]) == ("step-00000004", True, [])
    assert [one["file"] for one in bad["damage"]] == [name]
    code, out, err = called(capsys, "verify", run)
    assert code == 1
    assert f"\nstep-00000006  DAMAGED\n  {name}: " in out
    assert err == (
        "regpt: 1 of 2 checkpoints are damaged (step-00000006); restore their files; a resume goes on from "
        "step-00000004\n"
    )


def test_all_damaged_files_are_named_not_only_the_first(run):
    folder = checkpoint_folder(run, 6)
    names = ["ema.safetensors", "model.json", "optimizer-00002-of-00002.safetensors", "tokenizer.json"]
    for name in names:
        flip(folder / name)
    assert [one.file for one in find_damage(folder)] == names


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-00002-of-00002.safetensors"])
def test_numbers_that_are_not_finite_are_found_behind_a_right_manifest(run, name):
    folder = checkpoint_folder(run, 6)
    tensors = load_file(folder / name)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, folder / name)
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    (found,) = find_damage(folder)
    assert (found.file, found.what) == (name, f"holds numbers in {first!r} that are not finite")


def test_files_that_do_not_belong_together_are_found(run):
    folder = checkpoint_folder(run, 6)
    shape = json.loads((folder / "model.json").read_text(encoding="utf-8")) | {"max_seq_len": 9}
    (folder / "model.json").write_text(json.dumps(shape), encoding="utf-8")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    (found,) = find_damage(folder)
    assert found.file == "model.json"
    assert "asks for 'wpe.weight' of shape (9, 4)" in found.what
    with pytest.raises(UserError, match=r"model\.json' asks for 'wpe\.weight'"):
        verify_checkpoint(folder)


def test_a_run_without_a_good_checkpoint_says_so(run, capsys):
    for step in (4, 6):
        (checkpoint_folder(run, step) / "manifest.json").unlink()
    code, _, err = called(capsys, "verify", run)
    assert (code, "2 of 2 checkpoints are damaged" in err, "no resume is possible" in err) == (1, True, True)


@pytest.mark.parametrize("command", ["list", "verify"])
def test_nothing_is_changed(run, capsys, command):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    called(capsys, command, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("args", [("list", "nowhere"), ("verify", "nowhere"), ("verify", "."), ("lits",), ()])
def test_what_is_no_run_and_no_command_is_one_sentence(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    code, out, err = called(capsys, *args)
    assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "regpt: ")


def test_a_run_without_checkpoints_has_an_empty_list(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert called(capsys, "list", run)[:2] == (0, f"{run} has no checkpoint yet\n")
    (run / "checkpoints").mkdir()
    assert called(capsys, "verify", run)[0] == 1
