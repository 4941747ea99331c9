"""One example at a time, the whole logits: what the packed evaluation must equal."""

from collections.abc import Sequence

import numpy as np
import torch

from regpt.evals.packing import Prompt
from regpt.model.transformer import Transformer


@torch.no_grad()
def naive_scores(model: Transformer, prompts: Sequence[Prompt]) -> list[tuple[float, int, bool]]:
    """Log-likelihood, tokens and greediness of every ending, each from a forward pass of its own, in NumPy."""
    found = []
    for context, endings, scored in prompts:
        for ending, count in zip(endings, scored):
            tokens = np.concatenate([context, ending]).astype(np.int64)[-model.config.max_seq_len - 1 :]
            logits = model(torch.from_numpy(tokens[None, :-1]))[0].double().numpy()
            logits -= logits.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            at = np.arange(len(tokens) - 1 - count, len(tokens) - 1)
            hits = logits[at].argmax(axis=1) == tokens[at + 1]
            found.append((float(log_p[at, tokens[at + 1]].sum()), count, bool(hits.all())))
    return found


def random_prompts(n: int, vocab_size: int, *, longest: int = 9, seed: int = 0) -> list[Prompt]:
    """Contexts of 1 to `longest` tokens with 1 to 4 endings of 1 to 6 tokens, of which all or some are scored."""
    draw = np.random.default_rng(seed)
    prompts = []
    for _ in range(n):
        endings = [draw.integers(vocab_size, size=draw.integers(1, 7)) for _ in range(draw.integers(1, 5))]
        scored = [len(ending) if draw.random() < 0.7 else int(draw.integers(1, len(ending) + 1)) for ending in endings]
        prompts.append(Prompt(draw.integers(vocab_size, size=draw.integers(1, longest + 1)), endings, scored))
    return prompts
