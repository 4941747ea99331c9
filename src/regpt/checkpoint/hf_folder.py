"""Read a Hugging Face folder: `config.json` and safetensors, in one file or several with an index."""

from pathlib import Path

from regpt.checkpoint.files import read_json
from regpt.checkpoint.tensors import TensorFiles, find_divided
from regpt.errors import UserError
from regpt.files import is_file
from regpt.model.config import ModelConfig
from regpt.model.hf import WeightsFromHF, config_from_hf
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, without_memory
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
# Enough of GPT-2's vocabulary to tell it from another one of the same size ("Ġ" is how byte-level BPE spells a space).
GPT2_VOCAB_SIZE = 50257
GPT2_TOKENS = {"Hello": 15496, "Ġlanguage": 3303, "Ġmodel": 2746, "<|endoftext|>": 50256}


def hf_config(folder: Path) -> ModelConfig:
    """The shape in `config.json`.

    Raises:
        UserError: the file is missing or damaged, or describes a model that we do not implement.
    """
    try:
        return config_from_hf(read_json(folder / CONFIG))
    except UserError as error:
        raise UserError(f"model {str(folder)!r} cannot be read: {error}") from None


def hf_weights(folder: Path, config: ModelConfig) -> WeightsFromHF:
    """Our names → the folder's weights, read when they are asked for.

    Raises:
        UserError: no safetensors, or some that are damaged, have a head of their own, or are fewer than `config` wants.
    """
    paths = weight_files(folder)
    files = TensorFiles(paths)
    if config.n_layer > len(files) or parameters_of(config) > sum(path.stat().st_size for path in paths):
        raise UserError(  # before memory is taken for them
            f"model {str(folder)!r} has fewer weights than its {CONFIG} asks for; restore the folder or choose another "
            "model"
        )
    try:
        return WeightsFromHF(files)
    except UserError as error:
        raise UserError(f"model {str(folder)!r} cannot be read: {error}") from None


def parameters_of(config: ModelConfig) -> int:
    with without_memory():
        return count_parameters(Transformer(config))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if files := find_divided(folder, "model"):
        return files
    has = f"has only {PICKLE}, a pickle, which can execute code" if is_file(folder / PICKLE) else f"has no {WEIGHTS}"
    raise UserError(f"model {str(folder)!r} {has}; regpt reads safetensors only: {how_to_convert()}")


def how_to_convert() -> str:
    return "make them with transformers' save_pretrained, or choose another model"


def hf_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with `vocab_size` tokens: GPT-2's, or the folder's `tokenizer.json`.

    Raises:
        UserError: there is neither, or it has another number of tokens.
    """
    path = folder / TOKENIZER
    if vocab_size == GPT2_VOCAB_SIZE and (not is_file(path) or is_gpt2(path)):
        return open_tokenizer("gpt2")
    if not is_file(path):
        raise UserError(
            f"model {str(folder)!r} has {vocab_size:,} tokens, which is not GPT-2's vocabulary, and no {TOKENIZER}; "
            f"put the {TOKENIZER} it was trained with into the folder"
        )
    tokenizer = open_tokenizer(path)
    if tokenizer.n_vocab != vocab_size:
        raise UserError(
            f"model {str(folder)!r} has {vocab_size:,} tokens and its {TOKENIZER} {tokenizer.n_vocab:,}; "
            f"use the {TOKENIZER} it was trained with"
        )
    return tokenizer


def is_gpt2(path: Path) -> bool:
    """Whether the `tokenizer.json` at `path` holds GPT-2's vocabulary."""
    content = read_json(path)
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        vocab = {**content["model"]["vocab"], **added}
    except (KeyError, TypeError):
        return False  # whatever it is; opening it says so
    return all(vocab.get(token) == token_id for token, token_id in GPT2_TOKENS.items())
