"""The machinery of `faults.py`: one straight run, copies of it, processes that are watched."""

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoint_folder, checkpoints, newest_checkpoint, step_of, verify_checkpoint
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.engine.config import SampleConfig
from regpt.errors import UserError
from regpt.evals.config import EvalConfig
from regpt.model.config import ModelConfig
from regpt.prepare.prepare import prepare
from regpt.report.read import rows_by_step
from regpt.runs.pretrain import pretrain, resume
from regpt.runs.verify_resume import compare_runs
from regpt.text.bpe import train_bpe
from regpt.train.config import OptimConfig, TrainConfig

STEPS, EVERY = 100, 3


class Campaign:
    """The folder of all runs, the straight run, and what was seen."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.config = tiny_config(write_data(folder / "data"))
        self.straight = folder / "straight"
        assert self.run(lambda: pretrain(self.config, self.straight)) == 0
        self.expected = final_bytes(self.straight)
        rows = rows_by_step(self.straight, "train")
        self.step_seconds = sum(row["dt_ms"] for row in rows.values()) / len(rows) / 1e3

    def start(self, work: Callable[[], int]) -> int:
        """`work()` in a process of its own; its id. Output is left out."""
        child = os.fork()
        if child:
            return child
        code = 99
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.suppress(BaseException):
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            try:
                code = work()
            except UserError as error:
                (self.folder / "said.txt").write_text(str(error), encoding="utf-8")
                code = error.exit_code
        os._exit(code)

    def run(self, work: Callable[[], int]) -> int:
        return ended(self.start(work))

    def begin_or_resume(self, run: Path, config: RunConfig | None = None) -> Callable[[], int]:
        return lambda: resume(run) if (run / "config.toml").exists() else pretrain(config or self.config, run)

    def said(self) -> str:
        path = self.folder / "said.txt"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def is_straight(self, run: Path) -> bool:
        """Whether the finished run has every loss, norm and stored number of the straight one."""
        return compare_runs(self.straight, run).bitwise

    def copy(self, name: str, upto: int, inside: Path | None = None) -> Path:
        """The straight run as it was after step `upto`, in a folder of the campaign or `inside` another one."""
        run = (inside or self.folder) / name
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.straight, run)
        for folder in checkpoints(run):
            if step_of(folder) > upto:
                shutil.rmtree(folder)
        return run


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def final_bytes(run: Path) -> list[bytes]:
    folder = checkpoint_folder(run, STEPS)
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def write_data(folder: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices(["ba", "do", "mi", "ta", "ru", "ke"], k=draw.randint(1, 3))) for _ in range(40)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 50))) for _ in range(60)]
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    prepare([str(source)], folder, train_bpe(texts, 300), val_fraction=0.2, workers=1)
    return folder


def tiny_config(data: Path) -> RunConfig:
    """Checkpoints every few steps, all of them kept for the damage to choose from."""
    return RunConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, max_seq_len=16),
        data=DataConfig(path=str(data), seq_len=16),
        train=TrainConfig(
            steps=STEPS, batch_tokens=64, micro_batch_rows=4, precision="fp32", compile=False, device="cpu",
            deterministic=True,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every_steps=0, val_tokens=48),
        sample=SampleConfig(every_steps=0, prompt="ba bo", n=1, max_new_tokens=4),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=0),
    )  # fmt: skip


# ---- looking on ------------------------------------------------------------------------------------------------------


def wait_for_new_row(run: Path, child: int, draw: random.Random) -> None:
    """Until the child has written a random number of rows."""
    known = size(run)
    wanted = draw.randint(1, 12)
    while alive(child) and size(run) - known < 250 * wanted:
        time.sleep(1e-3)


def wait_for_writing(run: Path, child: int) -> None:
    """Until a checkpoint is being written."""
    old = {path.name for path in run.glob("checkpoints/.step-*.tmp-*")}
    while alive(child) and not {path.name for path in run.glob("checkpoints/.step-*.tmp-*")} - old:
        time.sleep(1e-4)


def alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def intact(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except UserError:
        return False
    return True


def newest(run: Path) -> int:
    try:
        return step_of(newest_checkpoint(run, warn=lambda message: None))
    except UserError:
        return 0


def events(run: Path, name: str) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [row for row in rows if row.get("name") == name]
