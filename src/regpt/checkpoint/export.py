"""Write a model as a Hugging Face folder that `from_pretrained` opens."""

from pathlib import Path

from regpt.checkpoint.hf_folder import CONFIG, TOKENIZER, WEIGHTS
from regpt.checkpoint.hf_tokenizer import tokenizer_config, tokenizer_json
from regpt.errors import UserError
from regpt.files import exists, is_folder, resolved, whole_folder, write_json, write_text
from regpt.model.hf import config_to_hf, weights_to_hf
from regpt.model.transformer import Transformer
from regpt.model.weights import state_tensors
from regpt.tensors import write_tensors
from regpt.text.tokenizer import Tokenizer


def export_hf(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Path:
    """Configuration, weights and tokenizer of `model` in `folder`, whole or not at all; returns it.

    Raises:
        UserError: `folder` exists and is not empty, the disk is full, or the place cannot be written to.
    """
    folder = resolved(folder)
    if exists(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise UserError(
            f"{str(folder)!r} exists and is not empty, an export needs a new folder; choose another --out or delete it"
        )
    with whole_folder(folder) as temporary:
        write_json(temporary / CONFIG, config_to_hf(model.config, tokenizer.eot))
        write_tensors(temporary / WEIGHTS, weights_to_hf(state_tensors(model)))
        write_text(temporary / TOKENIZER, tokenizer_json(tokenizer))
        write_json(temporary / "tokenizer_config.json", tokenizer_config(model.config.max_seq_len))
    return folder
