"""A run with checkpoints, and a run folder without."""

from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.text.bpe import train_bpe


@pytest.fixture(scope="session")
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
