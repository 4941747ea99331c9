"""The lecture's loop, which the engine is compared with: the whole text through the model for every token."""

import torch
from torch import Tensor

from regpt.engine.noise import choice_seed
from regpt.engine.processing import SamplingOptions, draw, rows_of
from regpt.model.transformer import Transformer


@torch.no_grad()
def generate_uncached(
    model: Transformer, idx: Tensor, max_new_tokens: int, options: SamplingOptions, seed: int
) -> Tensor:
    """`idx` (B, T) and the tokens drawn after them; past the model's length each follows from the last ones alone."""
    B, prompt_tokens = idx.shape
    seeds = [choice_seed(seed, row) for row in range(B)]
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.max_seq_len :])[:, -1]  # (B, V)
        texts = [(row[:prompt_tokens], row[prompt_tokens:]) for row in idx.tolist()]
        rows = rows_of([options] * B, seeds, logits.size(-1), texts, idx.device)
        positions = torch.full((B,), idx.size(1), device=idx.device)
        idx = torch.cat((idx, draw(logits, rows, positions).tokens[:, None]), dim=1)
    return idx
