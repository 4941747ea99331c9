"""`regpt export`: a model in a format that other programs open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line, print_note
from regpt.errors import UsageError


@dataclass(frozen=True)
class Export:
    """Write a model for other programs: a folder that Hugging Face's from_pretrained opens, or a file for llama.cpp."""

    model: tyro.conf.Positional[str]
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name such
    as gpt2."""
    out: Path
    """hf: the folder to write, new or empty. gguf: the file, new."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best")] = ""
    """Of a run: the checkpoint of this step, or best, that of the lowest validation loss; default: the newest."""
    ema: bool = False
    """With the moving average of the weights, which train.ema_decay keeps."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """hf: type of the weights; stored: that in which they are kept, float32 for a run."""
    format: Literal["hf", "gguf", "peft"] = "hf"
    """hf: config.json, model.safetensors, generation_config.json, the tokenizer; of an imported model its own options
    of generation and chat template. gguf: one file for llama.cpp and what is built on it.
    peft: of a run with adapters, them alone: adapter_config.json and adapter_model.safetensors."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16"
    """gguf: how matrices are stored; 8.5 and 4.5 bits a weight with q8_0 and q4_0."""
    check: bool = False
    """gguf: open the file with llama.cpp (pip install 'regpt[gguf]') and compare tokens and probabilities; print what
    the type costs."""
    other_template: bool = False
    """Export a chat template that is not the one which the model's certificate names."""
    data: str = ""
    """gguf, --check: a text file, whose loss before and after is printed; default: one text in many languages."""


def main(args: list[str]) -> int:
    command = parse(Export, args, prog="regpt export")
    if command.format != "gguf" and (command.check or command.data):
        raise UsageError("--check and --data belong to --format gguf; add it, or leave them out")
    if command.format == "gguf" and command.dtype != "stored":
        raise UsageError("--dtype is for --format hf; a GGUF file takes --type")
    if command.format == "peft" and command.dtype != "stored":
        raise UsageError("--dtype is for --format hf; adapters are stored in float32")
    import torch

    from regpt.checkpoint.best import at_step
    from regpt.checkpoint.open import open_model
    from regpt.model.weights import count_parameters
    from regpt.text.certificate import refuse_other_template
    from regpt.text.folder import CHAT

    if command.data:
        from regpt.runs.export import text_of

        text_of(command.data)  # refused before the work
    opened = open_model(at_step(command.model, command.step), ema=command.ema)
    if opened.model.config.reward_head:
        raise UsageError(f"{command.model} is a model of rewards, which no format has; export what it began with")
    template = opened.companions.get(CHAT, "")
    refuse_other_template(template, opened.companions, command.other_template)
    size = f"{count_parameters(opened.model):,} parameters"
    if command.format == "gguf":
        from regpt.runs.export import check_export, export_model_gguf

        f16 = export_model_gguf(opened, command.out, command.type)
        print_line(f"wrote {opened.source} ({size}) to {command.out}, {command.out.stat().st_size:,} bytes")
        if f16:
            print_note(f"{len(f16)} matrices such as {f16[0]} have f16: their rows are no multiple of 32")
        if command.check:
            print_line(check_export(opened, command.out, command.type, command.data))
        else:
            print_line(f"open it with: llama-cli -m {command.out}")
        return 0
    if command.format == "peft":
        from regpt.runs.export import export_adapters

        print_line(export_adapters(opened, command.out))
        return 0
    from regpt.hf.export import export_hf

    dtype = opened.dtype if command.dtype == "stored" else getattr(torch, command.dtype)
    others = {"source": opened.folder, "companions": opened.companions}
    folder = export_hf(opened.model, opened.tokenizer, command.out, dtype=dtype, **others)
    print_line(f"wrote {opened.source} ({size}) to {folder}")
    if opened.adapter is not None:
        from regpt.runs.export import merge_gap

        print_line(merge_gap(opened, folder, dtype))
    print_line(f"open it with: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0
