"""How `tests/goldens/run-1` was made: a tiny run, its data and its last checkpoint, in format version 1.

    python tests/goldens/make_run.py tests/goldens/run-2

It is never made again: a checkpoint that was written must stay readable. What a later version writes gets a folder of
its own beside it. What names a machine (host, paths) is replaced before it is stored. Prints what the test compares.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import Checkpoint, checkpoint_folder, load_checkpoint
from regpt.checkpoint.save import Contents, save_checkpoint
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.engine.config import SampleConfig
from regpt.evals.config import EvalConfig
from regpt.model.config import ModelConfig
from regpt.prepare.prepare import prepare
from regpt.report.read import rows_by_step
from regpt.runs.pretrain import pretrain
from regpt.text.bpe import train_bpe
from regpt.train.config import OptimConfig, TrainConfig

VOCAB, STEPS, STORED = 261, 6, 4
MAX_FILE_BYTES = 8000  # so that the weights are one file, and the moments several with an index


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} exists; a golden run is never written again")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_data()
        run = Path("run")
        assert pretrain(config(), run) == 0
        checkpoint = load_checkpoint(checkpoint_folder(run, STORED))
        copy = save_checkpoint(checkpoint_folder(Path("golden"), STORED), anonymous(checkpoint), MAX_FILE_BYTES)
        shutil.copytree("data", "golden/data")
        Path("golden/config.toml").write_text(config().to_toml(), encoding="utf-8", newline="\n")
        losses = {step: row["loss"] for step, row in rows_by_step(run, "train").items()}
        print(json.dumps({"manifest": sha256(copy / "manifest.json"), "losses": losses}, indent=1))
        shutil.copytree("golden", target)


def write_data() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices(["ba", "do", "mi", "ta"], k=draw.randint(1, 3))) for _ in range(20)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 30))) for _ in range(12)]
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    prepare(["text.jsonl"], Path("data"), train_bpe(texts, VOCAB), val_fraction=0.2, workers=1)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=4, vocab_size=VOCAB, max_seq_len=8),
        data=DataConfig(path="data", seq_len=8, seed=5),
        train=TrainConfig(
            steps=STEPS, batch_tokens=32, micro_batch_rows=2, precision="fp32", compile=False, device="cpu", seed=3,
            deterministic=True, ema_decay=0.9,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every_steps=0, val_tokens=32),
        sample=SampleConfig(every_steps=0, prompt="ba", n=1, max_new_tokens=2),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=0),
    )  # fmt: skip


def anonymous(checkpoint: Checkpoint) -> Contents:
    """What the checkpoint holds, without names of the machine that wrote it."""
    state = checkpoint.state
    settings = state.config | {"data": state.config["data"] | {"path": "data"}}
    state = replace(state, config=settings, made_with=state.made_with | {"host": "golden"})
    weights, optimizer, average = (
        {name: tensor.clone() for name, tensor in (tensors or {}).items()}
        for tensors in (checkpoint.weights(), checkpoint.optimizer(), checkpoint.average())
    )
    return Contents(checkpoint.config, checkpoint.tokenizer(), weights, optimizer, state, average)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
