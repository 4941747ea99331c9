"""A model, or adapters, as a GGUF file, compared with llama.cpp."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from regpt.checkpoint.base import AdapterParts, plain_shapes
from regpt.checkpoint.open import OpenModel, open_model
from regpt.errors import UserError
from regpt.files import exists, is_folder, write_json
from regpt.hf.gguf import GGUFFile
from regpt.hf.gguf_lora import export_gguf_lora, refuse_other_adapters
from regpt.hf.gguf_models import export_gguf
from regpt.hf.peft import export_peft
from regpt.model.adapters import Merged
from regpt.model.weights import load_weights, state_tensors
from regpt.text.folder import CHAT
from regpt.text.sentences import SENTENCES
from regpt.tools.llama_cpp import (
    LARGEST_KL,
    LARGEST_TIE,
    LOSS_TOKENS,
    STRINGS,
    ChatCheck,
    LlamaCheck,
    check_with_llama_cpp,
    loss_on,
)

GAP_TOKENS = 256
LARGEST_TEXT = 16 * LOSS_TOKENS  # bytes that are read of --data


def export_model_gguf(opened: OpenModel, out: Path, kind: str) -> tuple[list[str], Path | None]:
    """Write the file; the tensors whose rows do not fit `kind`, and the file of adapters next to it. A ternary base is
    ternary without its adapters alone, so in tq2_0 these are a file of their own.

    Raises:
        UserError: something of that name exists, or see `export_gguf` and `export_gguf_lora`.
    """
    parts, given = opened.adapter, (opened.tokenizer, out, kind, opened.companions.get(CHAT, ""))
    refuse_used_file(out)
    if kind != "tq2_0" or parts is None:
        return export_gguf(opened.model, *given), None
    lora = out.with_name(f"{out.stem}-lora.gguf")
    refuse_used_file(lora)
    refuse_other_adapters(opened.model.config, parts.config)
    f16 = export_gguf(opened.model, *given, weights=parts.weights())
    export_gguf_lora(opened.model.config, parts.config, parts.tensors, out.name, lora, "f32")
    return f16, lora


def refuse_used_file(out: Path) -> None:
    if exists(out):
        raise UserError(f"{str(out)!r} exists, an export needs a new file; choose another --out or delete it")
    if not is_folder(out.parent):
        raise UserError(f"there is no folder {str(out.parent)!r} for the file; make it or choose another --out")


def adapters_of(opened: OpenModel, form: str) -> AdapterParts:
    if opened.adapter is None:
        raise UserError(
            f"model {opened.source!r} has no adapters, which --format {form} writes; give a run with adapters, or "
            "export it with --format hf"
        )
    return opened.adapter


def export_adapters_gguf(opened: OpenModel, out: Path, kind: str) -> str:
    """Write the adapters of `opened` as a file for llama.cpp; the sentence to print.

    Raises:
        UserError: it has none, something of that name exists, or see `export_gguf_lora`.
    """
    parts = adapters_of(opened, "gguf-lora")
    refuse_used_file(out)
    export_gguf_lora(opened.model.config, parts.config, parts.tensors, parts.base, out, kind)
    return f"wrote the adapters of {opened.source} to {out}, {out.stat().st_size:,} bytes{of_base(parts)}"


def export_adapters(opened: OpenModel, out: Path) -> str:
    """Write the adapters of `opened` as a folder of peft's; the sentence to print.

    Raises:
        UserError: it has none, or see `export_peft`.
    """
    parts = adapters_of(opened, "peft")
    family = opened.model.config.family
    folder = export_peft(parts.config, parts.tensors, family, parts.base, parts.base_sha256, out)
    return f"wrote the adapters of {opened.source} to {folder}{of_base(parts)}"


def of_base(parts: AdapterParts) -> str:
    quantized = "" if parts.config.base == "none" else f"; they were trained on the base in {parts.config.base}"
    return f", for the base {parts.base!r}{quantized}"


@torch.no_grad()
def merge_gap(opened: OpenModel, folder: Path, dtype: torch.dtype) -> str:
    """What merged weights lose in `dtype`: computed on a text, stored as merge.json of `folder`; the sentence to print.
    The weights of `opened` are rounded afterwards."""
    model, tokenizer = opened.model, opened.tokenizer
    ids = [tokenizer.eot, *tokenizer.encode(text_of(""))][: min(GAP_TOKENS, model.config.max_seq_len)]
    idx = torch.tensor([ids], device=model.device)
    before = model(idx).double().log_softmax(-1)
    for p in model.parameters():
        p.copy_(p.to(dtype))
    after = model(idx).double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    largest, name = (before - after).abs().max().item(), str(dtype).removeprefix("torch.")
    write_json(folder / "merge.json", {"dtype": name, "kl": kl, "largest_difference": largest, "tokens": len(ids)})
    return (
        f"adapters are merged; rounded to {name} log-probabilities differ by at most {largest:.1e} and the KL "
        f"divergence is {kl:.1e} nats a token ({len(ids)} tokens, merge.json)"
    )


def check_adapters(opened: OpenModel, lora: Path, kind: str, strings: int = STRINGS) -> str:
    """`check_export` of the file `lora` on the base of `opened` in f32."""
    with tempfile.TemporaryDirectory(prefix="regpt-export-", ignore_cleanup_errors=True) as folder:
        file, weights = Path(folder) / "base.gguf", adapters_of(opened, "gguf-lora").weights()
        export_gguf(opened.model, opened.tokenizer, file, "f32", opened.companions.get(CHAT, ""), weights)
        return check_export(opened, file, kind, "", strings, lora)


def check_export(
    opened: OpenModel, file: Path, kind: str, data: str, strings: int = STRINGS, lora: Path | None = None
) -> str:
    """llama.cpp's reading of `file`, with the adapters `lora` on it, against ours, the loss of `opened` against that of
    the file; sentences to print.

    Raises:
        UserError: llama.cpp reads another text or, in f32, computes something else.
    """
    again = open_model(str(file))
    if lora is not None:  # our own adapters, unrounded, each weight in its own place
        parts, base = adapters_of(opened, "gguf-lora"), state_tensors(again.model)
        shapes = plain_shapes(again.model.config)
        load_weights(again.model, Merged(shapes, base, parts.tensors, replace(parts.config, base="none")))
    found = check_with_llama_cpp(file, again.model, again.tokenizer, strings, lora=lora)
    arch = GGUFFile(file).metadata["general.architecture"]
    ties = found.tokens - found.equal_tokens
    tie = f" (at the other {ties} our two likeliest are within {found.gap:.1e})" if ties else ""
    lines = [
        f"llama.cpp: {found.equal_tokens:,} of {found.tokens:,} greedy tokens as ours{tie}, KL divergence "
        f"{found.mean_kl:.1e} on average and at most {found.kl:.1e} nats, "
        f"log-probabilities of the two likeliest tokens within {found.shift:.1e} ({found.positions} positions), "
        f"{found.strings:,} strings become the same tokens, {of_chat(found.chat)}"
    ]
    if kind != "f32" and (lora is None or kind == "tq2_0"):
        ids = [opened.tokenizer.eot, *opened.tokenizer.encode(text_of(data))]
        before, after = loss_on(opened.model, ids), loss_on(again.model, ids)
        lines.append(
            f"loss {before:.4f} before and {after:.4f} in {kind} ({after - before:+.4f}), perplexity "
            f"{math.exp(before):.4g} and {math.exp(after):.4g}, on {min(len(ids), LOSS_TOKENS) - 1:,} tokens of "
            f"{data or 'a text in many languages'}"
        )
    refuse_difference(found, kind, LARGEST_KL[arch], LARGEST_TIE[arch])
    return "\n".join(lines)


def of_chat(chat: ChatCheck) -> str:
    """What of the chat template was compared."""
    if not chat.equal + chat.refused:
        return "no chat template"
    refused = f" (the template refuses {chat.refused} others)" if chat.refused else ""
    return f"the chat template renders {chat.equal} conversations as here{refused}"


def refuse_difference(found: LlamaCheck, kind: str, largest_kl: float, largest_tie: float) -> None:
    if found.different is not None:
        raise UserError(f"llama.cpp makes other tokens of {found.different!r} than this model's tokenizer; report it")
    if found.chat.different is not None:
        conversation, ours, theirs = found.chat.different
        raise UserError(
            f"llama.cpp renders the chat template of {conversation!r} as {theirs!r}, transformers as {ours!r}; "
            "the file is whole, but give llama.cpp another template"
        )
    if kind == "f32" and not (found.gap <= largest_tie and found.kl <= largest_kl):
        raise UserError(
            f"llama.cpp computes another model than ours: {found.equal_tokens:,} of {found.tokens:,} greedy tokens are "
            f"equal, our two likeliest are up to {found.gap:.1e} apart where they differ (at most {largest_tie:.0e} is "
            f"expected), the KL divergence is {found.kl:.1e} nats, at most {largest_kl:.0e} is expected; report it"
        )


def text_of(data: str) -> str:
    if not data:
        return "\n\n".join(SENTENCES.values())
    try:
        with Path(data).open("rb") as file:
            text = file.read(LARGEST_TEXT).decode(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {data!r} ({error.strerror or error}); give a text file") from None
    if len(text) < 2:
        raise UserError(f"{data!r} holds no text; give another")
    return text
