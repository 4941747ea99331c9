"""Receipts: all that texts follow from, with which anyone who has the weights writes them again."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from regpt import __version__
from regpt.engine.engine import Engine
from regpt.engine.generate import engine_for, make_sample
from regpt.engine.noise import choice_seed
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits
from regpt.engine.sequence import Sequence
from regpt.engine.structured import Structures
from regpt.engine.text import TextStream
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.structured import parse_as, parse_json, read_small
from regpt.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
REMEDY = "give a receipt of regpt serve or regpt sample --receipt, or the whole answer that has one"
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Origin:
    """A model where texts were written.

    Attributes:
        name: for people; and for `regpt verify-receipt` without `--model`.
        weights_sha256: of the file of the weights; of several that of `sha256sum`'s lines about them.
        tokenizer_sha256: of what decides its tokens.
        template_sha256: of the chat template that wrote the prompt; None where none did.
        precision, device: in which number format, and on what.
        kv_cache: format of keys and values; empty for that of the computation.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    weights_sha256: str
    tokenizer_sha256: str
    template_sha256: str | None
    precision: str
    device: str
    kv_cache: Literal["", "fp8"] = ""


@dataclass(frozen=True)
class WrittenText:
    """Token ids of a prompt and what followed it, the token that ended the text included; and the text's own seed."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt: tuple[int, ...]
    seed: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    """Texts, and what they follow from: model, limits, options, and each one's prompt and seed."""

    __pydantic_config__ = {"extra": "forbid"}

    model: Origin
    max_new_tokens: int
    options: SamplingOptions
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    texts: tuple[WrittenText, ...]
    json_schema: str | None = None
    regex: str | None = None
    regpt_version: str = __version__
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        model: Origin,
        requests: Items[Request],
        written: Items[Items[int]],
        structure: Mapping[str, str] | None = None,
    ) -> "Receipt":
        """Of the new tokens `written` for each text of each of `requests`, which have the options of the first alike;
        `structure` is a `json_schema` or a `regex`."""
        first, given = requests[0], structure or {}
        limits = first.max_new_tokens, first.options, tuple(first.stop), tuple(first.stop_ids)
        starts = [(tuple(one.prompt), choice_seed(one.seed, choice)) for one in requests for choice in range(one.n)]
        texts = tuple(WrittenText(*start, tuple(new)) for start, new in zip(starts, written, strict=True))
        return cls(model, *limits, texts, given.get("json_schema"), given.get("regex"))

    def to_json(self) -> dict[str, Any]:
        return {"format_version": self.format_version} | asdict(self)

    def requests(self, tokenizer: Tokenizer, n_vocab: int) -> list[Request]:
        """What writes the texts again."""
        structure = None
        if self.json_schema is not None or self.regex is not None:
            structures = Structures(tokenizer, n_vocab, self.stop_ids)
            given = structures.of_schema(self.json_schema) if self.json_schema is not None else None
            structure = given or structures.of_regex(self.regex or "")
        how = {"stop_ids": self.stop_ids, "stop": self.stop, "structure": structure}
        return [Request(one.prompt, self.max_new_tokens, self.options, one.seed, **how) for one in self.texts]


def read_receipt(path: Path) -> Receipt:
    """The receipt in a file, alone or in a whole answer of the server, streamed or not.

    Raises:
        UserError: no such file, or none in it, or of a newer format.
    """
    data = read_small(path, REMEDY, MAX_BYTES)
    try:
        streamed = [line[5:] for line in data.splitlines() if line.startswith(b"data:") and b'"receipt"' in line]
        content = parse_json(streamed[-1] if streamed else data)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}); {REMEDY}") from None
    for key in ("response", "regpt", "receipt"):  # the first in the last event of a streamed response
        content = content.get(key, content) if isinstance(content, dict) else content
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        said = f"{str(path)!r} is a receipt of format {version}, this regpt reads {FORMAT_VERSION}"
        raise UserError(f"{said}; install a newer regpt")
    try:
        found = parse_as(Receipt, json.dumps(content))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no receipt ({error}); {REMEDY}") from None
    if version != FORMAT_VERSION or not all(one.tokens for one in found.texts) or not found.texts:
        raise UserError(f"{str(path)!r} is no receipt (it has no format_version, or no texts); {REMEDY}")
    return found


@dataclass
class Verified:
    """A text, written again.

    Attributes:
        tokens: as they were written here.
        text: prompt and new text.
        differs: number of the first token that differs, from 0; None where none does.
        doubtful: tokens of the receipt that rounding decided otherwise here: their scores and those of the tokens
            drawn here are nearer to each other than the results of two devices.
    """

    tokens: list[int]
    text: str
    differs: int | None = None
    doubtful: list[int] = field(default_factory=list)


def reproduce(receipt: Receipt, model: Transformer, tokenizer: Tokenizer) -> list[Verified]:
    """Write the texts of a receipt again, all at once.

    Raises:
        UserError: the model cannot write them: too short, another vocabulary, logits that are not finite.
    """
    requests = receipt.requests(tokenizer, model.config.vocab_size)
    engine = engine_for(model, requests, tokenizer, narrow_cache=receipt.model.kv_cache == "fp8")
    found = [Verified(new, prompt_and_text(one, new, tokenizer)) for one, (new,) in zip(requests, engine.run(requests))]
    for text, one, request in zip(receipt.texts, found, requests):
        pairs = enumerate(zip_longest(text.tokens, one.tokens))
        one.differs = next((at for at, (given, new) in pairs if given != new), None)
        if one.differs is not None and engine.exact:
            one.differs, one.doubtful = follow(engine, request, text.tokens, one.differs)
    return found


def prompt_and_text(request: Request, tokens: Items[int], tokenizer: Tokenizer) -> str:
    """Prompt and new text, as `regpt sample` prints them."""
    stream = TextStream(tokenizer, request.prompt, request.stop)
    new = "".join(stream.push(token) for token in tokens if token not in request.stop_ids) + stream.finish()
    return make_sample(request.prompt, len(request.prompt), tokenizer).text + new


def follow(engine: Engine, request: Request, tokens: Items[int], start: int) -> tuple[int | None, list[int]]:
    """Draw each of `tokens` from `start` on after those before it, from an uncached forward: the number of the first
    that these weights cannot have written, and of those where only rounding decided."""
    doubtful = list[int]()
    end = end_of(engine, request, tokens)
    for at in range(start, len(tokens)):
        if at > end:
            return at, doubtful
        text = Sequence(0, 0, request, request.seed, [*request.prompt])
        text.tokens += tokens[:at]
        if request.structure:
            text.structure = request.structure()
            for token in tokens[:at]:
                text.structure.accept(token)
        with torch.no_grad(), engine.computing():
            token, _, finite, certain = engine.uncached(text)[0][0].tolist()
        if not finite:
            raise bad_logits()
        if token != tokens[at]:
            if certain:
                return at, doubtful
            doubtful.append(at)
    return (None if end == len(tokens) - 1 else len(tokens)), doubtful


def end_of(engine: Engine, request: Request, tokens: Items[int]) -> int:
    """Number of the token with which a text of `tokens` ends; their count where it does not end."""
    assert engine.tokenizer is not None
    stream = TextStream(engine.tokenizer, request.prompt, request.stop)
    for at, token in enumerate(tokens):
        if token in request.stop_ids or at + 1 == request.max_new_tokens:
            return at
        stream.push(token)
        if stream.stopped:
            return at
    return len(tokens)
