"""Write a model as a Hugging Face folder that `from_pretrained` opens."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.files import exists, is_file, is_folder, resolved, whole_folder, write_bytes, write_json, write_text
from regpt.hf.families import SPELLINGS, config_from_hf, config_to_hf, one_or_list
from regpt.hf.folder import CONFIG, TOKENIZER
from regpt.hf.hub import TEXT_FILES
from regpt.hf.weights import weights_to_hf
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import state_tensors
from regpt.tensors import write_divided
from regpt.text.folder import GENERATION, OPTIONS
from regpt.text.gpt2 import EOT, VOCAB_PACKAGE, byte_characters, find_vocabulary, ranks_from_files, ranks_from_network
from regpt.text.rules import Rules
from regpt.text.tokenizer import ENDOFTEXT, Tokenizer

MAX_FILE_BYTES = 5 * 10**9  # of weights; larger models are divided, as by transformers' save_pretrained


def export_hf(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    source: Path | None = None,
    companions: Mapping[str, str] | None = None,
) -> Path:
    """Configuration, weights and tokenizer of `model` in `folder`, whole or not at all; returns it.

    Args:
        dtype: of the stored weights.
        source: the Hugging Face folder that `tokenizer` is from, whose other files are kept: options and roles of its
            tokens, chat template, options of generation.
        companions: of a model without such a folder: chat template and options of generation, by file name.

    Raises:
        UserError: `folder` exists and is not empty, the disk is full, or the place cannot be written to, or a
            weight does not fit into `dtype`.
    """
    folder = resolved(folder)
    if exists(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise UserError(
            f"{str(folder)!r} exists and is not empty, an export needs a new folder; choose another --out or delete it"
        )
    with whole_folder(folder) as temporary:
        write_model(model, tokenizer, temporary, dtype)
        write_json(
            temporary / GENERATION, {"bos_token_id": tokenizer.eot, "eos_token_id": one_or_list(ends(tokenizer))}
        )
        write_json(temporary / OPTIONS, tokenizer_config(model.config.max_seq_len, tokenizer))
        for name, text in (companions or {}).items() if source is None else ():
            write_text(temporary / name, text)
        for file in [source / name for name in TEXT_FILES] if source else ():
            if is_file(file):
                write_bytes(temporary / file.name, file.read_bytes())
        if not is_file(temporary / TOKENIZER):
            write_text(temporary / TOKENIZER, tokenizer_json(tokenizer))
    return folder


def ends(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a text: where a token stands before every text, others than that one."""
    before = tokenizer.encode_prompts([""])[0].tolist()
    return [i for i in tokenizer.stop_ids if i not in before] or [tokenizer.eot]


def write_model(model: Transformer, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Configuration and weights of `model` in `folder`.

    Raises:
        UserError: transformers has no such model, or a weight does not fit into `dtype`.
    """
    name = str(dtype).removeprefix("torch.")
    weights = {key: converted(key, tensor, dtype) for key, tensor in state_tensors(model).items()}
    contents = config_to_hf(model.config, tokenizer.eot, name, ends(tokenizer))
    refuse_other_model(model.config.resolved(), contents)
    write_json(folder / CONFIG, contents)
    write_divided(folder, "model", weights_to_hf(weights, model.config.family), MAX_FILE_BYTES)


def refuse_other_model(shape: ModelConfig, contents: Mapping[str, Any]) -> None:
    """Raise a UserError where `contents` describe another model than `shape`, which transformers then does not have."""
    ours, theirs = computed(shape), computed(config_from_hf(contents).resolved())
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"model.{name} is {value}, which {SPELLINGS[shape.family].architecture} of transformers cannot compute "
                "(it has no place in a Hugging Face folder); use the run as it is, or train another model"
            )


def computed(shape: ModelConfig) -> dict[str, Any]:
    """Fields that logits depend on, one value for each way to compute; GPT-2 has its biases from `weights_to_hf`."""
    values = {name: getattr(shape, name) for name in ModelConfig.__dataclass_fields__ if name != "dropout"}
    values |= {"window": shape.window % shape.max_seq_len, "bias": shape.family == "gpt2" or shape.bias}
    values["rope_local_theta"] = shape.rope_local_theta or shape.rope_theta
    for name in ("no_rope_every", "full_attention_every"):
        values[name] *= values[name] <= shape.n_layer
    return values


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.to(dtype)
    if not found.isfinite().all():
        raise UserError(f"weight {name!r} has numbers beyond the range of {dtype}; export with --dtype bfloat16")
    return found


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Contents of Hugging Face's `tokenizer.json`: the tokenizer's own, or GPT-2's made from its ranks."""
    return gpt2_json() if tokenizer.name == "gpt2" else tokenizer.to_json()


def tokenizer_config(max_seq_len: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Contents of `tokenizer_config.json`; the class is the one that takes `tokenizer.json` as it is."""
    start, end = (tokenizer.token_bytes(i).decode() for i in (tokenizer.eot, ends(tokenizer)[0]))
    unknown = {"unk_token": start} if start == end else {}  # as in GPT-2's own
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        **unknown,
        "model_max_length": max_seq_len,
        # Without it transformers 4 also returns token_type_ids, whose embeddings GPT-2 adds to those of the text.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # decoding gives back exactly the text
    }


def gpt2_json() -> str:
    """GPT-2's `tokenizer.json`, from the same vocabulary files as the tokenizer itself."""
    files = find_vocabulary(VOCAB_PACKAGE)
    ranks = ranks_from_files(files) if files else ranks_from_network()
    spelling = byte_characters()
    spell = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()} | {ENDOFTEXT: EOT}
    joined = (token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)  # each was one merge
    merges = [(spell[left], spell[right]) for left, right in (last_merge(token, ranks) for token in joined)]
    return json.dumps(json.loads(Rules(vocab, merges, {ENDOFTEXT: EOT}, False).build().to_str()), ensure_ascii=False)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of which `token` was made: BPE on its own bytes (Sennrich et al. 2016), stopped before the end."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]
