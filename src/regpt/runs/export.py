"""A model as a GGUF file, compared with llama.cpp."""

import math
from pathlib import Path

from regpt.checkpoint.open import OpenModel, open_model
from regpt.errors import UserError
from regpt.files import exists, is_folder
from regpt.hf.gguf import GGUFFile
from regpt.hf.gguf_models import export_gguf
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

LARGEST_TEXT = 16 * LOSS_TOKENS  # bytes that are read of --data


def export_model_gguf(opened: OpenModel, out: Path, kind: str) -> list[str]:
    """Write the file; returns the tensors whose rows do not fit `kind`.

    Raises:
        UserError: something of that name exists, or see `export_gguf`.
    """
    if exists(out):
        raise UserError(f"{str(out)!r} exists, an export needs a new file; choose another --out or delete it")
    if not is_folder(out.parent):
        raise UserError(f"there is no folder {str(out.parent)!r} for the file; make it or choose another --out")
    return export_gguf(opened.model, opened.tokenizer, out, kind, opened.companions.get(CHAT, ""))


def check_export(opened: OpenModel, file: Path, kind: str, data: str, strings: int = STRINGS) -> str:
    """llama.cpp's reading of `file` against ours, the loss of `opened` against that of the file; sentences to print.

    Raises:
        UserError: llama.cpp reads another text or, in f32, computes something else.
    """
    again = open_model(str(file))
    found = check_with_llama_cpp(file, again.model, again.tokenizer, strings)
    arch = GGUFFile(file).metadata["general.architecture"]
    ties = found.tokens - found.equal_tokens
    tie = f" (at the other {ties} our two likeliest are within {found.gap:.1e})" if ties else ""
    lines = [
        f"llama.cpp: {found.equal_tokens:,} of {found.tokens:,} greedy tokens as ours{tie}, KL divergence "
        f"{found.mean_kl:.1e} on average and at most {found.kl:.1e} nats, "
        f"log-probabilities of the two likeliest tokens within {found.shift:.1e} ({found.positions} positions), "
        f"{found.strings:,} strings become the same tokens, {of_chat(found.chat)}"
    ]
    if kind != "f32":
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
