"""The pieces of a run, from its sections."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from regpt.config import RunConfig
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import Loader, row_batch
from regpt.data.manifest import Manifest, read_manifest
from regpt.data.stream import TokenStream, open_stream
from regpt.errors import UserError
from regpt.evals.perplexity import count_rows
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer
from regpt.train.precision import parameter_dtype


@dataclass(frozen=True)
class Corpus:
    """A folder of token shards that fits the model, opened."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    tokenizer: Tokenizer

    def stream(self, split: str, order: str, seed: int) -> TokenStream:
        return open_stream(self.folder, self.manifest, split, order, seed)


def open_corpus(config: RunConfig) -> Corpus:
    """Open `data.path` and check it against the configuration.

    Raises:
        UserError: no folder given or found, damaged files, another tokenizer or vocabulary than the model's.
    """
    if not config.data.path:
        raise UserError("no data was given; add --data DIR, a folder made with: regpt data prepare SOURCE --out DIR")
    folder = Path(config.data.path)
    manifest = read_manifest(folder)
    wanted = config.data.tokenizer
    if wanted and manifest.tokenizer != wanted:
        raise UserError(
            f"the shards in {folder} were made with the tokenizer {manifest.tokenizer!r}, data.tokenizer asks for "
            f"{wanted!r}; prepare the text again with --tokenizer {wanted}, or change data.tokenizer"
        )
    if manifest.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the shards in {folder} have a vocabulary of {manifest.vocab_size:,} tokens ({manifest.tokenizer}), "
            f"the model has {config.model.vocab_size:,}; set --model.vocab-size {manifest.vocab_size} or use other data"
        )
    tokenizer = open_tokenizer(folder if (folder / "tokenizer.json").is_file() else manifest.tokenizer)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"the tokenizer {tokenizer.name!r} is not the one that made the shards in {folder} (its hash differs); "
            "prepare the folder again"
        )
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return Corpus(folder, manifest, digest, tokenizer)


def build_model(config: RunConfig, device: torch.device) -> Transformer:
    """The model on `device`, its weights not yet set."""
    with torch.device("meta"):
        model = Transformer(config.model, pad_vocab=config.train.pad_vocab)
    return model.to(parameter_dtype(config.train.precision)).to_empty(device=device)


def build_loader(config: RunConfig, corpus: Corpus, mesh: Mesh) -> Loader:
    return Loader(
        corpus.stream("train", config.data.order, config.data.seed),
        seq_len=config.data.seq_len,
        batch_tokens=config.train.batch_tokens,
        micro_batch_rows=config.train.micro_batch_rows,
        dp_rank=mesh.rank,
        dp_size=mesh.world_size,
        pin_memory=mesh.device.type == "cuda",
    )


def count_validation_rows(config: RunConfig, corpus: Corpus) -> int:
    """Rows of each validation; 0 when the data has no validation split."""
    tokens = corpus.manifest.tokens("val")
    return count_rows(tokens, config.data.seq_len, config.eval.val_tokens) if tokens else 0


def validation_batches(config: RunConfig, stream: TokenStream, n_rows: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's share of the first `n_rows` rows of `stream`, every batch of the training's own shape.

    Rows beyond `n_rows` carry no target: a compiled loss sees one shape only, and every process makes as many calls.
    """
    B, T = config.train.micro_batch_rows, config.data.seq_len
    for call in range(math.ceil(n_rows / (B * mesh.world_size))):
        first = (call * mesh.world_size + mesh.rank) * B
        batch = row_batch(stream, first, B, T)
        batch.targets[max(0, n_rows - first) :] = IGNORE_INDEX
        yield batch
