"""The rules of a byte-level BPE: what of a `tokenizer.json` decides which tokens a text becomes, and their identity.

`canonical` spells the same rules with the same bytes, so its SHA-256 is the identity of a tokenizer wherever it came
from. What regpt cannot reproduce exactly is refused by the name of the option.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from json.encoder import encode_basestring as quote
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from regpt.errors import UserError
from regpt.structured import parse_json
from regpt.text.tokenizer import ENDOFTEXT

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character a byte (GPT-2's bytes_to_unicode)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Options of the library's BPE that change no token of a byte-level vocabulary, where all 256 bytes are known; the
# others must be unset. `models.BPE` documents them.
IDLE = ("type", "vocab", "merges", "ignore_merges", "unk_token", "fuse_unk", "byte_fallback")
# Sections besides the model: `truncation` and `padding` are the caller's matter, as in transformers.
SECTIONS = ("version", "truncation", "padding", "added_tokens", "model")
MEMBERS = {  # where a Sequence keeps its members
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


RESTORE = "restore the file or give another tokenizer"
STARTS_DOCUMENTS, ENDS_TEXT = "starts_documents", "ends_text"  # flags of added tokens that regpt writes
REFUSED = "not a BPE that regpt can use"


class NotATokenizer(UserError):
    """A file that is not a tokenizer of ours: the part of a sentence after "FILE is"; `remedy` ends it."""

    def __init__(self, reason: str, remedy: str = "give a file written by: regpt tokenizer train") -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True)
class Rules:
    """A byte-level BPE that splits text as GPT-2 does.

    Attributes:
        vocab: token → id, 0 … n - 1; bytes spelled as `BYTES`, special tokens as they are.
        merges: pairs of tokens in the order in which they are joined.
        special: the special tokens among `vocab`: no text becomes one of them.
        ignore_merges: a word that is a token is that token, whatever the merges would make of it (Llama 3's way).
        ends: special tokens that end a text besides `<|endoftext|>`; no part of the identity.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    ignore_merges: bool
    ends: tuple[str, ...] = ()

    def build(self) -> Tokenizer:
        """The library's tokenizer; text that spells a special token is only text to it."""
        tokenizer = byte_level_bpe(self.vocab, self.merges, self.ignore_merges)
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in self.special])
        tokenizer.encode_special_tokens = True
        return tokenizer

    def canonical(self) -> str:
        """What `to_json` returns without `ends`: byte for byte what the library writes for a BPE that it trained."""
        return replace(self, ends=()).to_json()

    def to_json(self) -> str:
        """Contents of a `tokenizer.json`."""
        first = min(self.special.values())
        trailing = sorted(self.special.values()) == list(range(first, len(self.vocab)))  # the library appends these
        own = {token: i for token, i in self.vocab.items() if not (trailing and token in self.special)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        by_id = sorted(self.special.items(), key=lambda pair: pair[1])
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": token, **flags, "special": True}
                | ({ENDS_TEXT: True} if token in self.ends else {})
                for token, i in by_id
            ],
            "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": None,
            "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.ignore_merges,
                "vocab": {},
                "merges": [],
            },
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # What is large, as the same call would write it, in a sixth of its time.
        rows = (f"      {quote(token)}: {i}" for token, i in sorted(own.items(), key=lambda pair: pair[1]))
        text = text.replace('"vocab": {}', '"vocab": {\n' + ",\n".join(rows) + "\n    }")
        pairs = (f"      [\n        {quote(a)},\n        {quote(b)}\n      ]" for a, b in self.merges)
        return text.replace('"merges": []', '"merges": [\n' + ",\n".join(pairs) + "\n    ]") if self.merges else text


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool = False) -> Tokenizer:
    """The library's tokenizer with GPT-2's pre-tokenization and no special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def parse_content(text: str) -> dict[str, Any]:
    """The JSON object that describes a tokenizer, or names one.

    Raises:
        NotATokenizer: it does not.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise NotATokenizer(f"not JSON ({error})") from None
    described = isinstance(content, dict) and (isinstance(content.get("model"), dict) or "name" in content)
    require(described, "it describes no tokenizer")
    return content


def read_rules(content: dict[str, Any]) -> Rules:
    """The rules in the contents of a `tokenizer.json`, as `parse_content` returns them.

    Everything is checked here because the library says no more than `Exception` about a file that it cannot use.

    Raises:
        NotATokenizer: not a byte-level BPE that splits text as GPT-2 does, or an option that changes tokens and that
            regpt does not implement, by its name.
    """
    model = content.get("model", {})
    kind = model.get("type", "BPE")  # the file that OpenAI's GPT-2 has on the hub leaves it out
    require(kind == "BPE", f"its model is {kind!r}, not 'BPE'")
    refuse_options(content, model)
    special = checked_special(content.get("added_tokens"))
    vocab = checked_vocab(model.get("vocab"), special)
    listed = content["added_tokens"]
    ends = tuple(token["content"] for token in listed if token.get(ENDS_TEXT) is True and token["content"] != ENDOFTEXT)
    merges = checked_merges(model.get("merges"), vocab)
    rules = Rules(vocab, merges, special, model.get("ignore_merges") is True, ends)
    refuse_text_as_special(rules)
    return rules


def is_like_gpt2(content: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` splits text as GPT-2 does, adds nothing to it and has only special added tokens."""
    try:
        refuse_options(content, content["model"])
        checked_special(content.get("added_tokens"))
    except UserError:
        return False
    flagged = [token["content"] for token in content["added_tokens"] if token.get(STARTS_DOCUMENTS) is True]
    return not flagged or flagged[0] == ENDOFTEXT


def refuse_options(content: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise a UserError that names an option which would change tokens."""
    splitting, expected = list(members(content, "pre_tokenizer")), "its text is not split as GPT-2's is: pre_tokenizer"
    kinds = [step.get("type") for step in splitting]
    require(kinds == ["ByteLevel"], f"{expected} is {kinds}, not ['ByteLevel']")
    for option, needed in (("use_regex", True), ("add_prefix_space", False)):
        given = splitting[0].get(option, needed)
        require(given is needed, f"{expected}.{option} is {given!r}, not {needed}")
    changing = [step.get("type") for step in members(content, "normalizer")]
    require(not changing, f"it changes the text before encoding: normalizer is {changing}")
    adding = [step.get("type") for step in members(content, "post_processor") if adds_tokens(step)]
    require(not adding, f"it adds tokens to every text: post_processor is {adding}")
    joining = [step.get("type") for step in members(content, "decoder") if step.get("type") != "ByteLevel"]
    require(not joining, f"its tokens are joined in another way: decoder is {joining}, not ['ByteLevel']")
    require(isinstance(model.get("ignore_merges", False), bool), "its model.ignore_merges is neither true nor false")
    other = [f"model.{key}" for key in model if key not in IDLE and model[key]]
    other += [key for key in content if key not in (*SECTIONS, *MEMBERS) and content[key]]
    require(not other, f"it sets {', '.join(other)}, which regpt does not implement")


def members(content: dict[str, Any], section: str) -> Iterator[dict[str, Any]]:
    """The steps of a section, those of a Sequence one by one."""
    waiting = [content.get(section)]
    while waiting:
        step = waiting.pop(0)
        if step is None:
            continue
        require(isinstance(step, dict), f"its {section} is {type(step).__name__}, not an object")
        if step.get("type") == "Sequence":
            inner = step.get(MEMBERS[section])
            require(isinstance(inner, list), f"its {section} is a Sequence without {MEMBERS[section]}")
            waiting = [*inner, *waiting]
        else:
            yield step


def adds_tokens(step: dict[str, Any]) -> bool:
    """Whether a post-processor does; ByteLevel's changes offsets only, a template may hold nothing but the text."""
    if step.get("type") == "TemplateProcessing":
        single = step.get("single")
        return not (isinstance(single, list) and len(single) == 1 and isinstance(single[0], dict)) or (
            "Sequence" not in single[0]
        )
    return step.get("type") != "ByteLevel"


def named_tokens(tokens: Any) -> list[dict[str, Any]]:
    """The added tokens, each with a name of its own and an id."""
    tokens = tokens or []
    sound = isinstance(tokens, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in tokens
    )
    require(sound, "its added tokens have no names and ids")
    names = {token["content"] for token in tokens}
    require("" not in names and all(map(has_utf8, names)), "an added token has no name")
    require(len(names) == len(tokens), "two of its added tokens have one name")
    return tokens


def checked_special(tokens: Any) -> dict[str, int]:
    """Name → id of the special tokens, `<|endoftext|>` among them."""
    tokens = named_tokens(tokens)
    special = {token["content"]: token["id"] for token in tokens}
    require(ENDOFTEXT in special, f"its special tokens are {sorted(special)}, without {ENDOFTEXT!r}")
    for token in tokens:
        require(token["content"].strip() != "", "a special token has no name")
        name = f"added token {token['content']!r}"
        require(token.get("special", True) is True, f"its {name} is not special, so text that spells it becomes it")
        eating = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        require(not eating, f"its {name} sets {', '.join(eating)}, which regpt does not implement")
    return special


def has_utf8(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def checked_vocab(vocab: Any, special: dict[str, int]) -> dict[str, int]:
    """Token → id, special tokens included."""
    require(isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()), "it has no vocabulary")
    require(vocab.keys() >= set(BYTES), "its vocabulary lacks some of the 256 bytes")
    strange = set("".join(vocab.keys() - special.keys())) - set(BYTES)
    require(not strange, f"its vocabulary has characters that stand for no byte, such as {min(strange, default='')!r}")
    require("" not in vocab, "its vocabulary has a token of no bytes")
    for token, i in special.items():
        require(vocab.get(token, i) == i, f"the special token {token!r} has the ids {vocab.get(token)} and {i}")
    vocab = {**vocab, **special}
    require(sorted(vocab.values()) == list(range(len(vocab))), "its token ids are not 0, 1, 2, …")
    return vocab


def checked_merges(merges: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs, of which the file may have made strings."""
    require(isinstance(merges, list), "it has no merges")
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    pairs: list[Any] = [tuple(merge) if isinstance(merge, (list, tuple)) else () for merge in split]
    sound = all(
        len(pair) == 2 and all(isinstance(part, str) and part in vocab for part in pair) and "".join(pair) in vocab
        for pair in pairs
    )
    require(sound, "a merge joins tokens that are not in its vocabulary")
    if len(set(pairs)) < len(pairs):
        seen: set[tuple[str, str]] = set()
        twice = next(pair for pair in pairs if pair in seen or seen.add(pair))
        require(False, f"its merge {' '.join(twice)!r} occurs twice, so its place in the order is not clear")
    return pairs


def refuse_text_as_special(rules: Rules) -> None:
    """Raise a UserError where ordinary text would become a special token."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made = {left + right for left, right in rules.merges} | set(BYTES)
    for token in rules.special:
        whole = rules.ignore_merges and len(words.pre_tokenize_str(token)) == 1
        require(token not in made and not whole, f"ordinary text becomes its special token {token!r}")


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotATokenizer(f"{REFUSED}: {otherwise}")
