"""`benchmarks/peers.py`: what it writes for other trainers holds the tokens of the data folder, in their formats."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from regpt.prepare.token_files import find_token_files

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"
FOLDERS = {"nanogpt": "nanogpt", "edu_fineweb10B": "build-nanogpt", "llmc": "llm.c"}


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_format_holds_the_same_tokens(peers, tmp_path: Path, capsys):
    peers.main(peers.Args(out=str(tmp_path / "out"), tokens=20_000))
    stored = np.fromfile(tmp_path / "out" / "regpt" / "train-00000.bin", dtype="<u2")[:20_000]
    for folder, kind in FOLDERS.items():
        found, _ = find_token_files([str(tmp_path / "out" / folder)], [], None, peers.VOCAB, Counter())
        files = {file.file: file for file in found}
        assert {file.format for file in files.values()} == {kind}
        train, val = (next(files[name].array() for name in files if split in name) for split in ("train", "val"))
        assert len(val) == len(stored) // 10
        assert np.array_equal(np.concatenate([val, train]), stored)
    assert "train: " in capsys.readouterr().out


def test_another_vocabulary_is_refused(peers, shards: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="vocabulary of 300"):
        peers.main(peers.Args(out=str(tmp_path / "out"), data=str(shards)))
