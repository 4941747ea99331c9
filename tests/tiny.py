"""A tiny run, in memory and on disk, and processes to share it: what the tests of several folders have in common."""

import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import start_processes

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoints
from regpt.checkpoint.save import Contents, save_checkpoint
from regpt.checkpoint.state import DataPosition, RunState
from regpt.config import RunConfig
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.config import DataConfig
from regpt.data.loader import dropout_keys
from regpt.engine.config import SampleConfig
from regpt.evals.config import EvalConfig
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import InitialWeights, load_weights, state_tensors, unpadded
from regpt.parallel.mesh import Mesh
from regpt.text.tokenizer import Tokenizer
from regpt.train.backend import DataParallel, make_backend
from regpt.train.balance import make_balance
from regpt.train.config import OptimConfig, TrainConfig
from regpt.train.objective import NextToken
from regpt.train.optim import make_optimizer
from regpt.train.precision import gradient_dtype
from regpt.train.schedule import make_schedule
from regpt.train.trainer import Trainer

CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)
# Odd on purpose: heads of 8, and a vocabulary that is no multiple of anything, so that it is padded from 97 to 128.
CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=24, vocab_size=97, max_seq_len=16)
# One of each family, odd too; a window, unrotated layers and heads of their own where the family may have them.
FAMILY_CONFIGS = {
    "gpt2": replace(CONFIG, activation="relu", bias="mlp", n_inner=37, tie_embeddings=False),
    "llama": replace(CONFIG, family="llama", n_head=6, n_kv_head=2, n_inner=40),
    "mistral": replace(CONFIG, family="mistral", n_inner=40, window=5),
    "qwen2": replace(CONFIG, family="qwen2", n_inner=40, tie_embeddings=False),
    "qwen3": replace(CONFIG, family="qwen3", n_kv_head=1, head_size=6, n_inner=40),
    "olmo2": replace(CONFIG, family="olmo2", n_inner=40),
    "smollm3": replace(CONFIG, family="smollm3", n_inner=40, no_rope_every=2),
    "mixtral": replace(CONFIG, family="mixtral", n_inner=13, n_expert=4, n_expert_shared=1),
    "olmoe": replace(CONFIG, family="olmoe", n_inner=12, n_expert=5, n_expert_active=3, norm_topk=False),
    "qwen3_moe": replace(CONFIG, family="qwen3_moe", n_kv_head=1, head_size=6, n_inner=12),
    "gemma3_text": replace(
        CONFIG, family="gemma3_text", n_inner=40, window=4, full_attention_every=2, query_pre_attn_scalar=5
    ),
    "gpt_neox": replace(CONFIG, family="gpt_neox", rope_fraction=0.5, tie_embeddings=False),
}
N_ROWS, SEQ_LEN = 8, 12
TRAIN = TrainConfig(precision="fp64")
OPTIM = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0)
# torch's own compiler imports a part of torch that warns of its age.
IMPORTS_COMPILER = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def build_model(*, pad_vocab: bool = True, dtype: torch.dtype = torch.float64, config: ModelConfig = CONFIG):
    """A model with weights larger than at initialisation, biases and LayerNorms too: every part has an effect."""
    model = make_model(config, pad_vocab=pad_vocab).to(dtype)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(InitialWeights(model, 0).shapes[name], generator=generator, dtype=torch.float64) * 0.2
        + (1.0 if len(InitialWeights(model, 0).shapes[name]) == 1 and name.endswith("weight") else 0.0)
        for name, _ in model.named_parameters()
    }
    return load_weights(model, weights)


class Rows:
    """A loader of random rows: the first has all its targets, the last none, those between fewer and fewer."""

    def __init__(self, *, micro_batch_rows: int = N_ROWS, dp_rank: int = 0, dp_size: int = 1, config=CONFIG):
        self.seq_len, self.vocab_size, self.dropout = SEQ_LEN, config.vocab_size, config.dropout
        self.micro_batch_rows, self.dp_rank, self.dp_size = micro_batch_rows, dp_rank, dp_size

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        idx, targets = self.rows(step)
        each = micro_batch_rows or self.micro_batch_rows
        starts = range(self.dp_rank * each, N_ROWS, self.dp_size * each)
        batches = [Batch(idx[i : i + each], targets[i : i + each]) for i in starts]
        if not self.dropout:
            return batches
        keys = torch.from_numpy(dropout_keys(3, step * N_ROWS, N_ROWS).astype("int64"))
        return [batch._replace(dropout_keys=keys[i : i + each]) for i, batch in zip(starts, batches)]

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """idx and targets (N_ROWS, SEQ_LEN) of the whole global batch."""
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.vocab_size, (N_ROWS, SEQ_LEN + 1), generator=generator)
        share_masked = torch.arange(N_ROWS)[:, None] / (N_ROWS - 1)  # (N_ROWS, 1)
        masked = torch.rand(N_ROWS, SEQ_LEN, generator=generator) < share_masked
        return tokens[:, :-1].contiguous(), tokens[:, 1:].masked_fill(masked, IGNORE_INDEX)


def build_trainer(
    model: Transformer,
    loader: Any,
    *,
    mesh: Mesh = ALONE,
    loss_sum: Callable[[Batch], Tensor] | None = None,
    train: TrainConfig = TRAIN,
    compile: bool = False,
    optim: OptimConfig = OPTIM,
) -> Trainer:
    """A trainer of `model` over `loader`; its batch is the loader's."""
    first = loader.step(0)[0].idx
    rows = len(first) * len(loader.step(0)) * mesh.world_size
    train = replace(train, batch_tokens=rows * first.size(1), micro_batch_rows=len(first), compile=compile)
    balance = make_balance(model, train)
    objective = NextToken(model, train.z_loss, balance)
    grad_dtype = gradient_dtype(train.weight_dtype, train.grad_dtype)
    backend = make_backend(model, objective, mesh, train.autocast_precision, compile=compile, grad_dtype=grad_dtype)
    optimizer = make_optimizer(model, optim, mesh.device, train.seed)
    schedule = make_schedule(optim, train.steps)
    trainer = Trainer(model, objective, backend, optimizer, schedule, loader, mesh, train, balance=balance)
    if loss_sum is not None:
        compute_by(trainer, loss_sum)
    return trainer


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes that forward keeps for backward, each memory once, weights left out."""

    def __init__(self, weights: list[Tensor]):
        self.seen = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = 0
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def data_parallel(trainer: Trainer) -> DataParallel:
    """The backend of `trainer`, whose loss may be replaced."""
    assert isinstance(trainer.backend, DataParallel)
    return trainer.backend


def compute_by(trainer: Trainer, loss_sum: Callable[[Batch], Tensor]) -> None:
    """The trainer's loss is that of `loss_sum` from now on."""
    data_parallel(trainer).loss_sum = lambda batch: (loss_sum(batch), {})


def loss_sum_of(trainer: Trainer) -> Callable[[Batch], Tensor]:
    """The summed loss of a micro-batch as the trainer computes it now."""
    own = data_parallel(trainer).loss_sum
    return lambda batch: own(batch)[0]


def loss_sum(model: Transformer, idx: Tensor, targets: Tensor, **places: Tensor) -> Tensor:
    """The objective's summed loss of one micro-batch; `places` are the other fields of `Batch`."""
    return NextToken(model).loss_sum(Batch(idx, targets)._replace(**places))[0]


def wrapping(wrap: Callable[[Transformer, Callable[[Batch], Tensor]], Callable[[Batch], Tensor]]) -> Callable[..., Any]:
    """A `make_backend` whose summed loss of a micro-batch is `wrap(model, the usual one)`."""

    def make(model: Transformer, *args: Any, **kwargs: Any) -> DataParallel:
        backend = make_backend(model, *args, **kwargs)
        good = backend.loss_sum
        wrapped = wrap(model, lambda batch: good(batch)[0])
        backend.loss_sum = lambda batch: (wrapped(batch), {})
        return backend

    return make


def update(trainer: Trainer) -> dict[str, Any]:
    """The row of the next update that is applied, as `Trainer.fit` makes it."""
    while (result := trainer.train_step()).verdict is not None:
        trainer.apply_verdict(result)
    return trainer.row(result, 1.0)


def step_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """`loss`, `norm` and the gradient of every parameter, unpadded and not clipped, of the trainer's next step."""
    trainer.config = replace(trainer.config, grad_clip=0.0)
    loss, norm, _ = trainer.gradients()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    named = {name: unpadded(trainer.model, name, gradient).clone() for name, gradient in gradients.items()}
    return {"loss": torch.tensor(loss, dtype=torch.float64), "norm": torch.tensor(norm, dtype=torch.float64)} | named


def largest_error(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor, as the length of the difference over the length of the tensor."""
    assert given.keys() == expected.keys()
    return max(
        (given[name] - tensor).norm().item() / tensor.norm().clamp(min=1e-300).item()
        for name, tensor in expected.items()
    )


# ---- on disk ---------------------------------------------------------------------------------------------------------

VOCAB = 300


def write_shards(folder: Path) -> Path:
    """Token shards of 60 documents in a small invented language, with their tokenizer."""
    from regpt.prepare.prepare import prepare
    from regpt.text.bpe import train_bpe

    draw = random.Random(0)
    words = ["".join(draw.choices(["ba", "do", "mi", "ta", "ru", "ke"], k=draw.randint(1, 3))) for _ in range(40)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 50))) for _ in range(60)]
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    prepare([str(source)], folder, train_bpe(texts, VOCAB), val_fraction=0.2, workers=1)
    return folder


def run_config(data: Path) -> RunConfig:
    """Eight steps of four rows on the CPU in float32, with validation, samples and checkpoints on the way."""
    return RunConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB, max_seq_len=16),
        data=DataConfig(path=str(data), seq_len=16),
        train=TrainConfig(
            steps=8, batch_tokens=64, micro_batch_rows=1, precision="fp32", compile=False, device="cpu", seed=3
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every_steps=3, val_tokens=48),
        sample=SampleConfig(every_steps=4, prompt="ba bo", n=1, max_new_tokens=4),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=0),
    )


def change(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """`config` with other values in one section."""
    return replace(config, **{section: replace(getattr(config, section), **values)})


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of that kind, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def final_files(run: Path) -> dict[str, bytes]:
    """The tensor files of the last checkpoint: weights, moments, and the average where there is one."""
    return {path.name: path.read_bytes() for path in sorted(checkpoints(run)[-1].glob("*.safetensors"))}


def save_model(folder: Path, model: Transformer, tokenizer: Tokenizer, step: int = 3) -> Path:
    """A checkpoint of a model without optimizer state."""
    state = RunState(step, DataPosition("0" * 64, next_row=0, seq_len=1, order="shuffle", seed=0))
    return save_checkpoint(folder, Contents(model.config, tokenizer, state_tensors(model), {}, state))


# ---- processes -------------------------------------------------------------------------------------------------------


def in_processes(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in `n` processes, each with torchrun's environment around it; their results, by rank.

    The store lives here, on a port that the system chose, as under torchrun. When one process fails the others are
    ended, and its traceback is raised here.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    method = "spawn" if sys.platform == "win32" else "forkserver"  # which imports torch once for all of them
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["torch", "regpt.runs.pretrain"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(be_rank, (n, store.port, folder, function, args), nprocs=n, start_method=method)
        return [torch.load(Path(folder) / str(rank)) for rank in range(n)]


def be_rank(rank: int, n: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # what torchrun sets
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already: no rank starts one
    }
    torch.save(function(*args), Path(folder) / str(rank))
