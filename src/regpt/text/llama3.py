"""Llama 3's `tokenizer.model`: tiktoken's text format, a base64 token and its rank a line.

The file holds neither the pattern that splits text nor the special tokens; both are those of Meta's code
(github.com/meta-llama/llama3 and llama-models, tokenizer.py), which the file is recognized for by its 128,000 ranks.
"""

import base64
import binascii
import re

from regpt.text.gpt2 import byte_characters
from regpt.text.rules import BYTE_LEVEL, ENDS_TEXT, RESTORE, NotATokenizer
from regpt.text.sentencepiece import joining_pairs
from regpt.text.spec import FLAGS, Json, before_every_text

RANKS, SPECIAL = 128_000, 256
LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
PATTERN = WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
START, ENDS = "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
HEADERS = {6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
NAMED_3_0 = {0: START, 1: "<|end_of_text|>", **HEADERS}  # place among the special tokens → name; the rest is reserved
NAMED_3_1 = NAMED_3_0 | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}

BYTES: Json = BYTE_LEVEL | {"use_regex": False}  # a word as its bytes, where another step has split the text


def split(pattern: str) -> Json:
    """A pre-tokenizer that splits text at the matches of `pattern`."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def is_tiktoken(data: bytes) -> bool:
    return LINE.match(data) is not None


def llama3_content(data: bytes, named: dict[int, str]) -> Json:
    """Contents of a `tokenizer.json` with the tokens of `data`; `named` as `NAMED_3_1`.

    The merges are all pairs that make a token, by its rank, as transformers' TikTokenConverter lists them.

    Raises:
        UserError: a damaged file, or the ranks of another model.
    """
    ranks = read_ranks(data)
    if len(ranks) != RANKS:
        raise NotATokenizer(
            f"a tiktoken file of {len(ranks):,} ranks, which lacks the pattern and the special tokens, and regpt knows "
            f"only those of Llama 3, with {RANKS:,} ranks",
            "give the tokenizer.json of this model",
        )
    spelling = byte_characters()
    spell = {token: "".join(map(spelling.__getitem__, token)) for token in ranks}
    scores = {token: -rank for token, rank in ranks.items()}
    merges = [(spell[left], spell[right]) for left, right in joining_pairs(scores, ranks)]
    names = name_special_tokens(named)
    flags = dict.fromkeys(FLAGS, False) | {"special": True}
    added = [
        {"id": RANKS + i, "content": name, **flags, **({ENDS_TEXT: True} if name in ENDS else {})}
        for i, name in enumerate(names)
    ]
    return {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(PATTERN), BYTES]},
        "post_processor": before_every_text(names[0], RANKS),
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def name_special_tokens(named: dict[int, str]) -> list[str]:
    """The 256 special tokens in the order of their ids: those in `named`, the others numbered as reserved ones."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(SPECIAL))
    return [named.get(place) or next(reserved) for place in range(SPECIAL)]


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Token → rank, 0 … n - 1.

    Raises:
        UserError: a line of something else, or ranks with a hole or a repetition.
    """
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    for number, line in enumerate(lines, start=1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank[:20])
        except (binascii.Error, ValueError):
            raise NotATokenizer(
                f"not a tiktoken file: line {number} is not a base64 token and its rank", RESTORE
            ) from None
    if sorted(ranks.values()) != list(range(len(lines))) or b"" in ranks:
        raise NotATokenizer("not a tiktoken file: its ranks are not 0, 1, 2, … once each", RESTORE)
    return ranks
