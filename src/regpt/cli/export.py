"""`regpt export`: a model in a format that other programs open."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line, print_note
from regpt.errors import UsageError

if TYPE_CHECKING:
    from regpt.checkpoint.open import OpenModel


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
    format: Literal["hf", "gguf", "gguf-lora", "peft"] = "hf"
    """hf: config.json, model.safetensors, generation_config.json, the tokenizer; of an imported model its own options
    of generation and chat template. gguf: one file for llama.cpp and what is built on it.
    Of a run with adapters, them alone: peft: adapter_config.json and adapter_model.safetensors; gguf-lora: one file,
    which llama.cpp adds to a base (--lora)."""
    type: Literal["default", "f32", "f16", "bf16", "q8_0", "q4_0", "tq2_0"] = "default"
    """gguf: how matrices are stored; 8.5 and 4.5 bits a weight with q8_0 and q4_0; tq2_0: 2.06 bits, of a ternary base,
    its adapters in a file next to it. default: f16, of adapters f32."""
    check: bool = False
    """gguf, gguf-lora: open the file with llama.cpp (pip install 'regpt[gguf]') and compare tokens and probabilities;
    print what the type costs."""
    other_template: bool = False
    """Export a chat template that is not the one which the model's certificate names."""
    data: str = ""
    """gguf, --check: a text file, whose loss before and after is printed; default: one text in many languages."""


def main(args: list[str]) -> int:
    command = parse(Export, args, prog="regpt export")
    gguf, lora = command.format == "gguf", command.format == "gguf-lora"
    if not gguf and (command.data or (command.check and not lora)):
        raise UsageError("--check and --data belong to --format gguf; add it, or leave them out")
    if not (gguf or lora) and command.type != "default":
        raise UsageError(
            f"--type is for GGUF files, the format is {command.format}; add --format gguf, or leave it out"
        )
    if command.format != "hf" and command.dtype != "stored":
        remedy = "adapters are stored in float32" if command.format == "peft" else "a GGUF file takes --type"
        raise UsageError(f"--dtype is for --format hf; {remedy}")
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
    if gguf:
        return write_gguf(opened, command, size)
    if lora:
        from regpt.runs.export import check_adapters, export_adapters_gguf

        kind = "f32" if command.type == "default" else command.type
        print_line(export_adapters_gguf(opened, command.out, kind))
        print_line(
            check_adapters(opened, command.out, kind)
            if command.check
            else f"add it to its base with: llama-cli -m BASE.gguf --lora {command.out}"
        )
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


def write_gguf(opened: "OpenModel", command: Export, size: str) -> int:
    from regpt.runs.export import check_export, export_model_gguf

    kind = "f16" if command.type == "default" else command.type
    f16, lora = export_model_gguf(opened, command.out, kind)
    base = "the ternary base of " if lora else ""
    print_line(f"wrote {base}{opened.source} ({size}) to {command.out}, {command.out.stat().st_size:,} bytes")
    if lora:
        print_line(f"wrote its adapters, which are not ternary, to {lora}, {lora.stat().st_size:,} bytes")
    if f16:
        print_note(f"{len(f16)} matrices such as {f16[0]} have f16: their rows are no multiple of 32")
    if command.check:
        print_line(check_export(opened, command.out, kind, command.data, lora=lora))
    else:
        print_line(f"open it with: llama-cli -m {command.out}" + (f" --lora {lora}" if lora else ""))
    return 0
