"""Read a Hugging Face folder: `config.json` and safetensors, in one file or several with an index."""

from pathlib import Path

import torch

from regpt.errors import UserError
from regpt.files import is_file
from regpt.hf.contradictions import bare, check_shapes, refuse_quantized
from regpt.hf.families import config_from_hf
from regpt.hf.weights import WeightsFromHF, is_buffer
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import count_parameters, without_memory
from regpt.structured import read_object
from regpt.tensors import REMEDY, TensorFiles, find_divided
from regpt.text.folder import MERGES, TOKENIZER, VOCAB, find_tokenizer
from regpt.text.library import LibraryTokenizer
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
HOW_TO_CONVERT = "make them with transformers' save_pretrained, or choose another model"
# Rows of an embedding beyond its tokenizer that padding explains: Megatron-LM's multiple of 128, on each of 8 devices.
MAX_PADDING = 1024


def hf_config(folder: Path) -> ModelConfig:
    """The shape in `config.json`.

    Raises:
        UserError: the file is missing or damaged, or describes a model that we do not implement.
    """
    try:
        return config_from_hf(read_object(folder / CONFIG, REMEDY))
    except UserError as error:
        raise UserError(f"model {str(folder)!r} cannot be read: {error}") from None


def hf_weights(folder: Path, config: ModelConfig, n_vocab: int | None = None) -> WeightsFromHF:
    """Our names → the folder's weights, read when they are asked for; only `n_vocab` rows of the token embedding.

    Raises:
        UserError: no safetensors, or some that are damaged, have a head of their own, or are fewer than `config` wants.
    """
    paths = weight_files(folder)
    files = TensorFiles(paths)
    refuse_quantized(files.dtype_of, folder)
    needed = float("inf")  # of more blocks than there are tensors, which take seconds to describe
    if config.n_layer <= len(files):
        with without_memory():
            model = make_model(config)
        check_shapes(model, files.shape_of, folder)
        needed = count_parameters(model)
    if needed > sum(path.stat().st_size for path in paths):
        raise UserError(  # before memory is taken for them
            f"model {str(folder)!r} has fewer weights than its {CONFIG} asks for; restore the folder or choose another "
            "model"
        )
    try:
        return WeightsFromHF(files, config.vocab_size, n_vocab, family=config.family, tied=config.tie_embeddings)
    except UserError as error:
        raise UserError(f"model {str(folder)!r} cannot be read: {error}") from None


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of all weights of `folder`; float32, in which any of them fit, where they are of several."""
    kinds = {kind for name, kind in TensorFiles(weight_files(folder)).dtype_of.items() if not is_buffer(bare(name))}
    small = {"BF16": torch.bfloat16, "F16": torch.float16}
    return small.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        UserError: there are none, the index is damaged, or it names files that are missing.
    """
    if files := find_divided(folder, "model"):
        missing = [file for file in files if not is_file(file)]
        if missing:
            raise UserError(
                f"cannot read {str(missing[0])!r}: {len(missing)} of the {len(files)} weight files that {INDEX} names "
                "are missing; copy or download them"
            )
        return files
    has = f"has only {PICKLE}, a pickle, which can execute code" if is_file(folder / PICKLE) else f"has no {WEIGHTS}"
    raise UserError(f"model {str(folder)!r} {has}; regpt reads safetensors only: {HOW_TO_CONVERT}")


def hf_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The folder's tokenizer, for a model whose embedding has `rows` rows: those beyond the tokenizer are padding.

    Raises:
        UserError: there is no tokenizer, or it has more tokens than there are rows, or far fewer.
    """
    file = find_tokenizer(folder)
    if file is None:
        raise UserError(
            f"model {str(folder)!r} has {rows:,} tokens and no tokenizer; put the {TOKENIZER} it was trained with into "
            f"the folder, or {VOCAB} and {MERGES} (GPT-2's is in the repository openai-community/gpt2)"
        )
    tokenizer = open_tokenizer(folder)
    if tokenizer.n_vocab > rows and isinstance(tokenizer, LibraryTokenizer):
        tokenizer = tokenizer.within(rows)  # Gemma 3's 1B: one of an image, which this model never reads
    if not 0 <= rows - tokenizer.n_vocab < MAX_PADDING:
        raise UserError(
            f"model {str(folder)!r} has {rows:,} tokens and its {file.name} {tokenizer.n_vocab:,}, which padding of "
            f"the vocabulary (below {MAX_PADDING:,} rows) does not explain; use the {file.name} it was trained with"
        )
    return tokenizer
