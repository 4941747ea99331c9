"""What a `tokenizer.json` of any BPE says: vocabulary, steps, special tokens, which of them start and end a text.

Files of Hugging Face do not say in one place which token starts a document. The rule is, in this order: the flag
`starts_documents` of an added token (regpt writes it), the token that the post-processor puts before every text,
`<|endoftext|>`, one of `STARTS`. `text/folder.py` sets the flag from the files next to a `tokenizer.json`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from regpt.text.gpt2 import BYTE_OF, byte_characters
from regpt.text.rules import (
    BYTES,
    ENDS_TEXT,
    MEMBERS,
    REFUSED,
    SECTIONS,
    STARTS_DOCUMENTS,
    NotATokenizer,
    checked_merges,
    members,
    named_tokens,
    require,
)
from regpt.text.tokenizer import ENDOFTEXT

SPACE = "\u2581"  # how SentencePiece spells a space
STARTS = (ENDOFTEXT, "<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")
STEPS = ("normalizer", "pre_tokenizer", "decoder")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NOT_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text contains
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
JOINING = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")  # decoders of SentencePiece's models
UNUSABLE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # of the library's BPE
KNOWN = ("type", "vocab", "merges", "ignore_merges", "unk_token", "fuse_unk", "byte_fallback", *UNUSABLE)
HOLES = 2  # ids for each token, at most: the rest would be rows of nothing

Json = dict[str, Any]


@dataclass(frozen=True)
class BPESpec:
    """A BPE of a `tokenizer.json`.

    Attributes:
        vocab: token → id, added tokens included.
        merges: pairs of tokens in the order in which they are joined.
        added: the added tokens by id, as the library writes them: no others are special, and text is searched for
            those that are not.
        options: those of the library's model but the vocabulary and the merges.
        normalizer, pre_tokenizer, decoder: steps, Sequences resolved.
        byte_level: tokens are spelled as `BYTES`; otherwise as SentencePiece does, with `SPACE` and `<0x0A>`.
        start: the token that starts every document.
        template: whether transformers puts it before every text.
        ends: further tokens that end a text.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[Json]
    options: Json
    normalizer: list[Json]
    pre_tokenizer: list[Json]
    decoder: list[Json]
    byte_level: bool
    start: str
    template: bool
    ends: tuple[str, ...]

    @functools.cached_property
    def special(self) -> dict[str, int]:
        return {token["content"]: token["id"] for token in self.added if token["special"]}

    @functools.cached_property
    def prefix(self) -> bool:
        """Whether encoding puts a space before a text, which decoding takes away."""
        return any(map(adds_space, self.normalizer)) or any(map(adds_space, self.pre_tokenizer))

    def without_prefix(self) -> BPESpec:
        """The same for text that follows other text."""
        splitting = [
            {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step for step in self.pre_tokenizer
        ]
        return replace(
            self, normalizer=[step for step in self.normalizer if not adds_space(step)], pre_tokenizer=splitting
        )

    def within(self, rows: int) -> BPESpec:
        """The same without the special tokens whose ids are `rows` or more."""
        beyond = {token for token, i in self.special.items() if i >= rows} - {self.start}
        return replace(
            self,
            vocab={token: i for token, i in self.vocab.items() if token not in beyond},
            added=[token for token in self.added if token["content"] not in beyond],
            ends=tuple(token for token in self.ends if token not in beyond),
        )

    def stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.vocab[token] for token in (self.start, *self.ends)))

    def token_bytes(self, n_vocab: int) -> list[bytes]:
        """What each id stands for; of a special token its name, of an id without a token nothing."""
        table = [b""] * n_vocab
        own = {token["content"]: token["special"] for token in self.added}
        for token, i in self.vocab.items():
            if own.get(token) or (token in own and self.byte_level):
                table[i] = token.encode()
            elif self.byte_level:
                table[i] = token.translate(BYTE_OF).encode("latin-1")
            else:
                fallback = FALLBACK.fullmatch(token)
                table[i] = bytes.fromhex(fallback[1]) if fallback else token.replace(SPACE, " ").encode()
        return table

    def canonical(self) -> str:
        """What decides the tokens of a text and what a document starts with, in one spelling."""
        plain = [[token[key] for key in ("content", "id", *FLAGS)] for token in self.added if not token["special"]]
        content = {
            "normalizer": list(map(without_defaults, self.normalizer)),
            "pre_tokenizer": list(map(without_defaults, self.pre_tokenizer)),
            "ignore_merges": bool(self.options["ignore_merges"]),
            "byte_level": self.byte_level,
            "start": self.start,
            "special": sorted(self.special.items(), key=lambda pair: pair[1]),
            "added": plain,
            "vocab": sorted(self.vocab.items(), key=lambda pair: pair[1]),
            "merges": self.merges,
        }
        return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    def to_content(self) -> Json:
        """Contents of a `tokenizer.json` that Hugging Face's tools open too."""
        added = [
            token
            | ({STARTS_DOCUMENTS: True} if token["content"] == self.start else {})
            | ({ENDS_TEXT: True} if token["content"] in self.ends else {})
            for token in self.added
        ]
        own = {token["content"] for token in added}
        base = {token: i for token, i in self.vocab.items() if token not in own}
        if sorted(self.vocab.values()) != list(range(len(self.vocab))) or max(base.values()) >= len(base):
            base = self.vocab  # the library numbers added tokens that are not in it one after another
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": as_sequence("normalizer", self.normalizer),
            "pre_tokenizer": as_sequence("pre_tokenizer", self.pre_tokenizer),
            "post_processor": before_every_text(self.start, self.vocab[self.start]) if self.template else None,
            "decoder": as_sequence("decoder", self.decoder),
            "model": {**self.options, "vocab": base, "merges": self.merges},
        }


def without_defaults(step: Json) -> Json:
    """`step` without what changes no token, or is off: an option that a later library adds leaves the identity."""
    return {key: value for key, value in step.items() if value not in (None, False) and key != "trim_offsets"}


def adds_space(step: Json) -> bool:
    return step["type"] == "Prepend" or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")


def as_sequence(section: str, steps: list[Json]) -> Json | None:
    """A section of `tokenizer.json` from its steps."""
    return {"type": "Sequence", MEMBERS[section]: steps} if len(steps) > 1 else steps[0] if steps else None


def before_every_text(token: str, i: int) -> Json:
    """A post-processor that puts one token before a text, and before each of a pair."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    known = {token: {"id": token, "ids": [i], "tokens": [token]}}
    pair = [special, first, special, second]
    return {"type": "TemplateProcessing", "single": [special, first], "pair": pair, "special_tokens": known}


def read_spec(content: Json) -> BPESpec:
    """The BPE in the contents of a `tokenizer.json`, as `parse_content` returns them.

    Raises:
        UserError: no BPE, a damaged one, or one with an option that regpt cannot represent, by its name.
    """
    model = content["model"]
    kind = model.get("type", "BPE" if "merges" in model else "without a type")
    require(kind == "BPE", f"its model is {kind!r}, not 'BPE'")
    other = [f"model.{key}" for key in model if key in UNUSABLE and model[key]]
    other += [f"model.{key}" for key in model if key not in KNOWN and model[key]]
    other += [key for key in content if key not in (*SECTIONS, *MEMBERS) and content[key]]
    require(not other, f"it sets {', '.join(other)}, which regpt does not implement")
    small = without_vocabulary(content, model)
    steps, options = written_steps(small)
    byte_level = is_byte_level(steps)
    added = checked_added(content.get("added_tokens"))
    vocab = checked_ids(model.get("vocab"), added)
    check_spelling(vocab, {token["content"] for token in added}, byte_level, options)
    merges = checked_merges(model.get("merges"), vocab)
    start, template = find_start(content, added)
    ends = tuple(token["content"] for token in added if token.get(ENDS_TEXT) is True and token["content"] != start)
    added = [{key: token[key] for key in ("id", "content", *FLAGS)} for token in added]
    spec = BPESpec(
        vocab, merges, added, options, **steps, byte_level=byte_level, start=start, template=template, ends=ends
    )
    refuse_text_as_special(spec, small)
    return spec


def without_vocabulary(content: Json, model: Json) -> Tokenizer:
    """The library's tokenizer with the steps of `content` and no tokens."""
    for section in STEPS:
        list(members(content, section))  # a readable error, before the library's
    small = {key: model[key] for key in model if key not in ("vocab", "merges")}
    only = {"version": "1.0", **{section: content.get(section) for section in STEPS}}
    try:
        return Tokenizer.from_str(json.dumps({**only, "model": {**small, "type": "BPE", "vocab": {}, "merges": []}}))
    except Exception as error:  # the only class that the library raises
        raise NotATokenizer(f"{REFUSED}: the tokenizers library cannot read its steps ({error})") from None


def written_steps(small: Tokenizer) -> tuple[dict[str, list[Json]], Json]:
    """Steps of the sections and options of the model as the library writes them, defaults filled in."""
    written = json.loads(small.to_str())
    options = {key: value for key, value in written["model"].items() if key not in ("vocab", "merges")}
    return {section: list(members(written, section)) for section in STEPS}, options


def is_byte_level(steps: dict[str, list[Json]]) -> bool:
    """Whether tokens are spelled as bytes; raises where regpt cannot say which bytes a token stands for."""
    kinds = [step["type"] for step in steps["decoder"]]
    splitting = [step["type"] for step in steps["pre_tokenizer"]]
    if "ByteLevel" in splitting:
        require(set(kinds) <= {"ByteLevel"}, f"its pre_tokenizer is ByteLevel, and its decoder {kinds}")
        spaced = any(step.get("add_prefix_space") for step in steps["pre_tokenizer"])
        require(not spaced, "pre_tokenizer.add_prefix_space is True: its decoder does not take that space away")
        return True
    spelled = any(
        step["type"] == "Metaspace" or (step["type"] == "Replace" and step["content"] == " ")
        for step in steps["decoder"]
    )
    require(set(kinds) <= set(JOINING) and spelled, f"its tokens are joined in another way: decoder is {kinds}")
    adding = any(map(adds_space, [*steps["normalizer"], *steps["pre_tokenizer"]]))
    taking = any(step["type"] == "Strip" or adds_space(step) for step in steps["decoder"])
    require(adding == taking, "one of encoding and decoding treats a space at the front, and not the other")
    return False


def checked_added(tokens: Any) -> list[Json]:
    """The added tokens by id, their flags filled in as the library does."""
    filled = [{**dict.fromkeys(FLAGS, False), "special": True, **token} for token in named_tokens(tokens)]
    return sorted(filled, key=lambda token: token["id"])


def checked_ids(vocab: Any, added: list[Json]) -> dict[str, int]:
    """Token → id, added tokens included."""
    sound = isinstance(vocab, dict) and all(type(i) is int and i >= 0 for i in vocab.values())
    require(sound, "it has no vocabulary of whole numbers")
    require("" not in vocab, "its vocabulary has a token of no bytes")
    for token in added:
        before = vocab.get(token["content"], token["id"])
        require(before == token["id"], f"the added token {token['content']!r} has the ids {before} and {token['id']}")
    whole = {**vocab, **{token["content"]: token["id"] for token in added}}
    require(bool(whole), "its vocabulary is empty")
    if len(set(whole.values())) < len(whole):
        seen: dict[int, str] = {}
        token, i = next((token, i) for token, i in whole.items() if seen.setdefault(i, token) != token)
        require(False, f"the tokens {seen[i]!r} and {token!r} have one id, {i}")
    highest = max(whole.values())
    require(highest < HOLES * len(whole), f"its ids go up to {highest:,}, and it has only {len(whole):,} tokens")
    return whole


def check_spelling(vocab: dict[str, int], added: set[str], byte_level: bool, options: Json) -> None:
    """Raise a UserError where a text has no tokens, or a token stands for no bytes."""
    if byte_level:
        missing = [byte for byte, spelled in enumerate(byte_characters()) if spelled not in vocab]
        require(set(missing) <= NOT_UTF8, "its vocabulary lacks some of the 256 bytes")
        strange = set("".join(vocab.keys() - added)) - set(BYTES)
        found = repr(min(strange, default=""))
        require(not strange, f"its vocabulary has characters that stand for no byte, such as {found}")
        return
    require(options["byte_fallback"], "model.byte_fallback is off, so characters that it does not know are lost")
    spelled = {f"<0x{byte:02X}>" if byte > 127 or chr(byte) not in vocab else chr(byte): byte for byte in range(256)}
    missing = [byte for name, byte in spelled.items() if name not in vocab]
    require(set(missing) <= NOT_UTF8, "its vocabulary lacks some of the 256 bytes (<0x00> … <0xFF>)")


def find_start(content: Json, added: list[Json]) -> tuple[str, bool]:
    """The token that starts every document, and whether the post-processor adds it to every text."""
    before = template_token(content)
    flagged = [token["content"] for token in added if token.get(STARTS_DOCUMENTS) is True]
    names = {token["content"] for token in added}
    start = next((token for token in (*flagged[:1], before, *STARTS) if token in names), None)
    if start is None:
        raise NotATokenizer(
            f"{REFUSED}: nothing in it says which token starts a document",
            "put a tokenizer_config.json that sets bos_token next to it and give the folder",
        )
    special = next(token for token in added if token["content"] == start)["special"]
    require(special, f"its {start!r}, which starts a document, is not special, so text could become it")
    return start, start == before


def template_token(content: Json) -> str | None:
    """The one token that the post-processor puts before every text."""
    found = None
    for step in members(content, "post_processor"):
        kind = step.get("type")
        if kind == "ByteLevel":
            continue  # changes offsets only
        require(kind == "TemplateProcessing", f"post_processor is {kind!r}, which regpt does not implement")
        names = list(template_names(step))
        if len(names) == 2 and found is None and names[0] and not names[1]:
            found = names[0]
        else:
            shown = [name or "the text" for name in names]
            require(names == [None], f"its post_processor makes of every text {shown}, not one token and the text")
    return found


def template_names(step: Json) -> Iterator[str | None]:
    """Tokens of a template; None for the text."""
    for part in step.get("single") or []:
        inner = part.get("SpecialToken") if isinstance(part, dict) else None
        yield inner.get("id") if isinstance(inner, dict) else None


def refuse_text_as_special(spec: BPESpec, small: Tokenizer) -> None:
    """Raise a UserError where ordinary text would become a special token."""
    made, words = {left + right for left, right in spec.merges}, small.pre_tokenizer
    for token in spec.special:
        whole = spec.options["ignore_merges"] and (words is None or len(words.pre_tokenize_str(token)) == 1)
        require(token not in made and not whole, f"ordinary text becomes its special token {token!r}")
