"""The pieces of a run, from its sections."""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from regpt.config import RunConfig
from regpt.data.config import ShuffleRows
from regpt.data.info import tokenizer_identity, tokenizer_of
from regpt.data.loader import Loader, RampLoader, StepBatches
from regpt.data.manifest import Manifest, read_manifest
from regpt.data.mixture import MixedRows, whole_shares
from regpt.data.packed import ConversationRows
from regpt.data.ramp import Stage, stages_of
from regpt.data.rows import Rows, open_rows
from regpt.data.stream import ShardStream, open_stream
from regpt.data.verify import SMALL_BYTES, verify_small
from regpt.errors import UsageError, UserError
from regpt.evals.perplexity import count_rows
from regpt.files import file_sha256
from regpt.kernels.select import Kernels, check_compiler, ops_of, select_kernels
from regpt.model.adapters import adapt
from regpt.model.families import make_model
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import Transformer
from regpt.model.weights import allocate, without_memory
from regpt.parallel.mesh import Mesh
from regpt.runs.validation import ValidationPart, conversation_rows, folder_parts, mixture_parts
from regpt.text.chat import ChatTemplate
from regpt.text.companions import read_companions
from regpt.text.folder import CHAT
from regpt.text.tokenizer import Tokenizer
from regpt.train.backend import make_backend
from regpt.train.balance import make_balance
from regpt.train.grpo import PolicyGradient
from regpt.train.objective import NextToken
from regpt.train.precision import gradient_dtype, parameter_dtype, set_matmul_precision
from regpt.train.preference import Preference
from regpt.train.probe import choose_rows
from regpt.train.recompute import compile_blocks, mlps_in_pieces, recompute_blocks
from regpt.train.schedule import make_schedule
from regpt.train.trainer import Trainer


@dataclass(frozen=True)
class DataFolder:
    """A folder of token shards that fits the model."""

    path: Path
    manifest: Manifest
    manifest_sha256: str

    def stream(self, split: str, order: str, seed: int) -> ShardStream:
        return open_stream(self.path, self.manifest, split, order, seed)


@dataclass(frozen=True)
class Corpus:
    """The data of a run: one data folder, or several of them, `shares[k]` rows of folder k in every `sum(shares)`."""

    folders: tuple[DataFolder, ...]
    shares: tuple[int, ...]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Opened when it is first asked for: batches need none."""
        return tokenizer_of(self.folders[0].path, self.folders[0].manifest)

    def chat(self) -> ChatTemplate | None:
        """The template of conversations."""
        folder = self.folders[0]
        conversations = folder.manifest.has_parts
        return ChatTemplate(read_companions(folder.path)[CHAT], self.tokenizer) if conversations else None

    @property
    def manifest_sha256(self) -> str:
        """Of the one folder's manifest; of all manifests and shares where there are several."""
        if len(self.folders) == 1:
            return self.folders[0].manifest_sha256
        parts = [f"{folder.manifest_sha256} {share}\n" for folder, share in zip(self.folders, self.shares)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.folders[0].manifest.vocab_size

    def facts(self) -> dict[str, Any]:
        """Its facts for env.json."""
        return {
            "path": " + ".join(str(folder.path) for folder in self.folders),
            "manifest_sha256": self.manifest_sha256,
            "tokenizer": self.folders[0].manifest.tokenizer,
            "tokenizer_sha256": tokenizer_identity(self.folders[0].path, self.folders[0].manifest),
            "train_tokens": self.tokens("train"),
            "val_tokens": self.tokens("val"),
            "train_bytes": self.text_bytes("train"),
            "val_bytes": self.text_bytes("val"),
            "sources": list(dict.fromkeys(str(one.get("source", "")) for one in self.sources())),
        }

    def sources(self) -> list[dict[str, Any]]:
        """Sources of the text, from the manifests."""
        return [source for folder in self.folders for source in folder.manifest.sources]

    def text_bytes(self, split: str) -> int | None:
        """UTF-8 bytes of the documents of a split; None where a folder does not say."""
        known = [folder.manifest.text_bytes.get(split) for folder in self.folders]
        return sum(n for n in known if n is not None) if None not in known else None

    def verify_small(self) -> list[Path]:
        """Compare the shards of folders with little data with their SHA-256; the folders with more, which are not read.

        Raises:
            UserError: a damaged file.
        """
        left, unread = SMALL_BYTES, []
        for folder in self.folders:
            read = verify_small(folder.path, folder.manifest, left)
            left -= read or 0
            unread += [folder.path] if read is None else []
        return unread

    def tokens(self, split: str) -> int:
        return sum(folder.manifest.tokens(split) for folder in self.folders)

    def rows(
        self, split: str, order: str, seed: int, seq_len: int, shuffle_rows: ShuffleRows = "epoch", batch_rows: int = 0
    ) -> Rows:
        """The rows of a split; for validation, a mixture leaves out the folders that held out nothing."""
        if len(self.folders) > 1 and any(folder.manifest.has_parts for folder in self.folders):
            raise UserError("folders of conversations are not mixed; give regpt finetune all their files with --data")
        chosen = [k for k, folder in enumerate(self.folders) if split == "train" or folder.manifest.tokens(split)]
        settings = (split, order, seed, seq_len, shuffle_rows, batch_rows)
        parts = [open_rows(self.folders[k].path, self.folders[k].manifest, *settings) for k in chosen]
        return parts[0] if len(self.folders) == 1 else MixedRows(parts, [self.shares[k] for k in chosen])


def open_corpus(config: RunConfig) -> Corpus:
    """Open `data.path`, or the folders of `data.mixture`, and their tokenizer; raises what `open_shards` does.

    Raises:
        UserError: the tokenizer cannot be had, or is not the one that made the shards.
    """
    corpus = open_shards(config)
    _ = corpus.tokenizer  # opened here, where what is wrong with it can be said
    return corpus


def open_shards(config: RunConfig) -> Corpus:
    """Open `data.path`, or the folders of `data.mixture`, and check them against the configuration.

    Raises:
        UserError: no folder given or found, damaged files, another tokenizer or vocabulary than the model's.
        UsageError: a folder given twice, or weights too far apart.
    """
    weights = config.data.mixture or {config.data.path: 1.0}
    if not config.data.path and not config.data.mixture:
        raise UserError("no data was given; add --data DIR, a folder made with: regpt data prepare SOURCE --out DIR")
    folders = tuple(open_folder(Path(path), config) for path in weights)
    first, *others = folders
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise UsageError(f"data.mixture names the same folder twice ({', '.join(weights)}); add up its weights")
    for other in others:
        if tokenizer_identity(other.path, other.manifest) != tokenizer_identity(first.path, first.manifest):
            raise UserError(
                f"the shards in {other.path} were made with another tokenizer ({other.manifest.tokenizer}) than those "
                f"in {first.path} ({first.manifest.tokenizer}); prepare one of them again with the other's tokenizer"
            )
    return Corpus(folders, tuple(whole_shares(weights)))


def open_folder(path: Path, config: RunConfig) -> DataFolder:
    manifest = read_manifest(path)
    wanted = config.data.tokenizer
    if wanted and wanted != manifest.tokenizer and wanted != tokenizer_of(path, manifest).name:
        raise UserError(
            f"the shards in {path} were made with the tokenizer {manifest.tokenizer!r}, data.tokenizer asks for "
            f"{wanted!r}; prepare the text again with --tokenizer {wanted}, or change data.tokenizer"
        )
    if config.model.vocab_size not in (0, manifest.vocab_size):
        raise UserError(
            f"the shards in {path} have a vocabulary of {manifest.vocab_size:,} tokens ({manifest.tokenizer}), "
            f"the model has {config.model.vocab_size:,}; set --model.vocab-size {manifest.vocab_size}, "
            "leave it out, or use other data"
        )
    return DataFolder(path, manifest, file_sha256(path / "manifest.json"))


def build_model(config: RunConfig, device: torch.device, ops: Ops = PLAIN) -> Transformer:
    """The model on `device`, its weights not yet set, its operations those of `ops` but for what its precision changes.

    Raises:
        UsageError: the device cannot compute in this precision.
    """
    ops = ops_of(config.train.precision, device, ops)
    with without_memory():
        model = adapt(make_model(config.model, ops, pad_vocab=config.train.pad_vocab), config.adapter)
    return allocate(model, device, parameter_dtype(config.train.precision, config.train.weight_dtype))


def build_loader(
    config: RunConfig, corpus: Corpus, mesh: Mesh, first_row: int = 0, ahead: int = 0
) -> Loader | RampLoader:
    """The batches of a run: from `first_row` on, or with a ramp `ahead` steps later than their numbers."""
    data, train = config.data, config.train
    batch_rows = train.batch_tokens // data.seq_len
    rows = corpus.rows("train", data.order, data.seed, data.seq_len, data.shuffle_rows, batch_rows)
    check_pairs(config, rows)
    settings: dict[str, Any] = {
        "micro_batch_rows": train.first_rows,
        "dp_rank": mesh.rank,
        "dp_size": mesh.world_size,
        "eot": mask_token(config, corpus),
        "pin_memory": mesh.device.type == "cuda",
        "dropout_seed": train.seed if config.model.dropout or config.adapter.dropout else None,
    }
    if not train.batch_ramp:
        return Loader(rows, batch_tokens=train.batch_tokens, first_row=first_row, **settings)
    return RampLoader(rows, run_stages(config), ahead=ahead, **settings)


def check_pairs(config: RunConfig, rows: Rows) -> None:
    """Raise a UserError where the objective is about pairs and the data are not, or the other way round, or where the
    reference's log-probabilities are missing."""
    paired, asked = isinstance(rows, ConversationRows) and rows.paired, config.preference
    if bool(asked.method) != paired:
        there = "holds pairs of answers" if paired else "holds no pairs of answers"
        raise UserError(
            f"{rows.source} {there}, preference.method is {asked.method or 'empty'}; begin a run with: regpt "
            "finetune dpo-124m --init-from MODEL --data PAIRS --out RUN"
        )
    if isinstance(rows, ConversationRows) and asked.reference and rows.reference is None:
        raise UserError(
            f"{rows.source} lacks the reference's log-probabilities; begin the run again with regpt finetune"
        )


def run_stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of `train.batch_ramp`; a run without one has one stage."""
    return stages_of(config.train.batch_tokens, config.data.seq_len, config.train.batch_ramp)


def build_trainer(
    config: RunConfig,
    mesh: Mesh,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: StepBatches,
    *,
    step: int = 0,
) -> Trainer:
    """The trainer of a run after `step` updates; sets how this process multiplies float32 matrices."""
    set_matmul_precision(config.train.precision)
    train = config.train
    kernels = choose_kernels(config, model, mesh.device).name
    if train.mlp_tokens:
        mlps_in_pieces(model, train.mlp_tokens)
    blocks = train.compile_blocks and kernels == "plain"
    if blocks:
        check_compiler(mesh.device)
        compile_blocks(model, deterministic=train.deterministic)
    if train.activation_checkpointing:
        recompute_blocks(model)
    balance = make_balance(model, train)
    objective = Preference(model, config.preference) if config.preference.method else None
    if config.grpo.tasks:
        objective = PolicyGradient(model, config.grpo, config.grpo.max_new_tokens)
    objective = objective or NextToken(model, train.z_loss, balance)
    path: dict[str, Any] = {"compile": train.compile and not blocks, "kernels": kernels}
    path |= {
        "offload": train.activation_offload,
        "deterministic": train.deterministic,
        "grad_dtype": gradient_dtype(train.weight_dtype, train.grad_dtype),
    }
    backend = make_backend(model, objective, mesh, train.autocast_precision, **path)
    schedule = make_schedule(config.optim, train.steps)
    return Trainer(model, objective, backend, optimizer, schedule, batches, mesh, train, step=step, balance=balance)


def with_chosen_rows(config: RunConfig, trainer: Trainer) -> tuple[RunConfig, dict[str, Any]]:
    """`config` with a number in the place of `train.micro_batch_rows = "auto"`, and how it was found, for env.json."""
    if config.train.micro_batch_rows != "auto":
        return config, {}
    choice = choose_rows(trainer)
    trainer.micro_batch.rows = choice.chosen
    config = replace(config, train=replace(config.train, micro_batch_rows=choice.chosen))
    return config, {"micro_batch_rows": asdict(choice)}


def choose_kernels(config: RunConfig, model: Transformer, device: torch.device) -> Kernels:
    """The path that computes the loss; raises what `kernels.select.select_kernels` does."""
    train = config.train
    plain = {"train.z_loss": train.z_loss, "preference.method": config.preference.method}
    plain |= {"train.mlp_tokens": train.mlp_tokens, "grpo.tasks": config.grpo.tasks}
    for name, asked in plain.items():
        if asked and train.kernels == "fused":
            raise UsageError(f"{name} needs plain kernels, train.kernels is fused; set --train.kernels plain or auto")
        if asked:
            return Kernels("plain", f"{name} needs them")
    how = {"recompute": train.activation_checkpointing, "offload": train.activation_offload}
    return select_kernels(train.kernels, model, device, train.precision, deterministic=train.deterministic, **how)


def mask_token(config: RunConfig, corpus: Corpus) -> int | None:
    """The token at which attention is cut, if it is to be masked by document."""
    return corpus.folders[0].manifest.eot if config.data.document_mask else None


def count_validation_rows(config: RunConfig, corpus: Corpus) -> int:
    """Rows of each validation, so many that no folder's split is read twice; 0 when there is no validation split."""
    tokens = [folder.manifest.tokens("val") for folder in corpus.folders]
    if not any(tokens):
        return 0
    T = config.data.seq_len
    if corpus.folders[0].manifest.has_parts:
        return conversation_rows(corpus.rows("val", "sequential", 0, T), config.eval.val_tokens)
    rows = [count_rows(n, T) for n in tokens if n]
    mixed = corpus.rows("val", "sequential", 0, T)
    whole = mixed.rows_within(rows) if isinstance(mixed, MixedRows) else rows[0]
    return count_rows(whole * T + 1, T, config.eval.val_tokens)


def validation_parts(config: RunConfig, corpus: Corpus) -> list[ValidationPart]:
    """The rows of each validation, source by source; empty when there is no validation split."""
    n_rows, T = count_validation_rows(config, corpus), config.data.seq_len
    if not n_rows or config.model.reward_head:  # rewards are ranked at the end
        return []
    if len(corpus.folders) == 1:
        folder = corpus.folders[0]
        return folder_parts(folder.path, folder.manifest, T, config.eval.val_tokens)
    rows = corpus.rows("val", "sequential", 0, T)
    names = [str(folder.path) for folder in corpus.folders if folder.manifest.tokens("val")]
    return mixture_parts(rows, names, n_rows) if isinstance(rows, MixedRows) else [ValidationPart("", rows, n_rows)]
