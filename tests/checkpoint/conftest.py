"""A tiny model, its tokenizer and optimizer state."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.save import Contents, save_checkpoint
from regpt.checkpoint.state import DataPosition, RunState
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize, state_tensors
from regpt.text.bpe import BPETokenizer, train_bpe

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=27, vocab_size=263, max_seq_len=37)


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    return train_bpe(["the cat sat on the mat, then the other cat sat on that mat"] * 2, CONFIG.vocab_size)


@pytest.fixture
def model() -> Transformer:
    return initialize(make_model(CONFIG), 1)


@pytest.fixture
def optimizer(model: Transformer) -> dict[str, Tensor]:
    """AdamW's moments as the trainer names them."""
    generator = torch.Generator().manual_seed(2)
    return {
        f"{moment}/{name}": torch.rand(weight.shape, generator=generator)
        for moment in ("exp_avg", "exp_avg_sq")
        for name, weight in state_tensors(model).items()
    }


@pytest.fixture
def contents(model: Transformer, tokenizer: BPETokenizer, optimizer: dict[str, Tensor]) -> Callable[[int], Contents]:
    """`contents(step)`: what a checkpoint of the model would hold, over the tensors themselves."""

    def at_step(step: int) -> Contents:
        position = DataPosition("0" * 64, next_row=3 * step, seq_len=8, order="shuffle", seed=5)
        state = RunState(step, position, config={"sample": {"prompt": "é"}})
        return Contents(model.config, tokenizer, state_tensors(model), optimizer, state)

    return at_step


@pytest.fixture
def save(contents: Callable[[int], Contents]) -> Callable[..., Path]:
    """`save(run, step)` writes a checkpoint."""

    def save_step(run: Path, step: int, **options: int) -> Path:
        return save_checkpoint(checkpoint_folder(run, step), contents(step), **options)

    return save_step


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
