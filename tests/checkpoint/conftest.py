"""A tiny model, its tokenizer and optimizer state, and a run with checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.save import save_checkpoint
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize, state_tensors
from regpt.text.bpe import BPETokenizer, train_bpe

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=27, vocab_size=263, max_seq_len=37)


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    return train_bpe(["the cat sat on the mat, then the other cat sat on that mat"] * 2, CONFIG.vocab_size)


@pytest.fixture
def model() -> Transformer:
    return initialize(Transformer(CONFIG), 1)


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
def save(model: Transformer, tokenizer: BPETokenizer, optimizer: dict[str, Tensor]) -> Callable[[Path, int], Path]:
    """`save(run, step)` writes a checkpoint."""

    def save_step(run: Path, step: int) -> Path:
        state = {"step": step, "row": 3 * step, "name": "é"}
        folder = checkpoint_folder(run, step)
        return save_checkpoint(folder, model=model, tokenizer=tokenizer, optimizer=optimizer, state=state)

    return save_step
