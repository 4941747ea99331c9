"""The files of a small run folder as `regpt train` leaves them, without training anything."""

import json
from pathlib import Path

CONFIG = """[model]
family = "gpt2"
n_layer = 2
n_head = 4
n_embd = 64

[train]
steps = 40
batch_tokens = 1024
grad_clip = 1.0

[sample]
prompt = "Hello"
"""
ENV = {
    "regpt": "0.1.0",
    "device": "cpu",
    "world_size": 1,
    "argv": ["regpt", "train", "quickstart", "--out", "a run"],
    "data": {"path": "data", "tokenizer": "bpe", "train_tokens": 3210041},
    "parameters": 2_837_760,
    "unigram_loss": 4.5,
    "started": 1785405780,
}


def train_row(step: int, **changes) -> dict:
    row = {
        "kind": "train",
        "step": step,
        "tokens": 1024 * step,
        "loss": 3 + 5 / step,
        "lr": 1e-3 / step,
        "grad_norm": 1 / step,
        "dt_ms": 500.0,
        "tokens_per_s": 2048.0,
        "mfu": None,
        "flops": 1e9 * step,
        "peak_memory_gib": None,
        "time": 1785405780 + step / 2,
    }
    return row | changes


def val_row(step: int, loss: float, **more) -> dict:
    return {"kind": "val", "step": step, "loss": loss, "bpb": loss / 4} | more


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
