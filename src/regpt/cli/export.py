"""`regpt export`: a model in a format that other programs open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line


@dataclass(frozen=True)
class Export:
    """Write a model for other programs: a folder that Hugging Face's from_pretrained opens."""

    model: tyro.conf.Positional[str]
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, or a hub name such as gpt2."""
    out: Path
    """Folder to write, new or empty."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best")] = ""
    """Of a run: the checkpoint of this step, or best, that of the lowest validation loss; default: the newest."""
    ema: bool = False
    """With the moving average of the weights, which train.ema_decay keeps."""
    format: Literal["hf"] = "hf"
    """hf: config.json, model.safetensors and the tokenizer."""


def main(args: list[str]) -> int:
    command = parse(Export, args, prog="regpt export")
    from regpt.checkpoint.best import at_step
    from regpt.checkpoint.open import open_model
    from regpt.hf.export import export_hf
    from regpt.model.weights import count_parameters

    opened = open_model(at_step(command.model, command.step), ema=command.ema)
    folder = export_hf(opened.model, opened.tokenizer, command.out)
    print_line(f"wrote {opened.source} ({count_parameters(opened.model):,} parameters) to {folder}")
    print_line(f"open it with: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0
