"""Conversations of the tests: invented ones, and folders of shards that hold given tokens and parts."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tiny
from regpt.data.manifest import Manifest
from regpt.model.config import ModelConfig
from regpt.prepare.conversation_shards import EncodedSplit
from regpt.prepare.shards import finish_folder
from regpt.text.bpe import byte_tokenizer
from regpt.text.tokenizer import Tokenizer

Documents = Sequence[tuple[Sequence[int], Sequence[int]]]  # token ids, parts


def write_conversations(
    folder: Path, documents: Documents, val: Documents = (), tokenizer: Tokenizer | None = None
) -> Manifest:
    """A folder of shards with these documents."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, own in (("train", documents), ("val", val)):
        if own:
            encoded = EncodedSplit()
            encoded.ids = [np.array(ids, dtype=np.uint32) for ids, _ in own]
            encoded.parts = [np.array(parts, dtype=np.uint8) for _, parts in own]
            shards.append(encoded.write(folder, split, "uint16"))
    return finish_folder(folder, tokenizer or byte_tokenizer(), "uint16", shards)


def invented(lengths: Sequence[int], vocab: int = 97, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Documents of these lengths, each with a trained end and, in longer ones, untrained tokens between answers."""
    draw = random.Random(seed)
    found = []
    for n in lengths:
        parts = [0, *draw.choices([0, 1, 2], k=n - 1)]
        parts[-1] = 2 if n > 1 else 0
        found.append(([draw.randrange(vocab) for _ in range(n)], parts))
    return found


def save_byte_model(folder: Path) -> Path:
    """A model of bytes that has learned nothing, of one layer and 128 positions."""
    model = tiny.make_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, max_seq_len=128))
    tiny.load_weights(model, tiny.InitialWeights(model, 5))
    return tiny.save_model(folder, model, byte_tokenizer())


TUNING = ["--data.seq-len", "128", "--train.batch-tokens", "512", "--train.micro-batch-rows", "2"]
TUNING += ["--train.device", "cpu", "--train.deterministic", "True", "--optim.warmup-steps", "2"]
TUNING += ["--optim.lr", "0.01", "--checkpoint.keep-last", "0", "--sample.prompt", "say 1", "--val-fraction", "0.2"]


def write_answers(path: Path, n: int = 40) -> Path:
    """A file of `n` questions with their answers, in a small invented language."""
    draw = random.Random(1)
    words = ["ba", "do", "mi", "ta", "ru", "ke"]
    rows = [
        {"instruction": f"say {k} {' '.join(draw.choices(words, k=3))}", "output": " ".join(draw.choices(words, k=4))}
        for k in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
