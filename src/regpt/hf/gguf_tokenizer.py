"""Tokenizers in a GGUF file: the keys `tokenizer.ggml.*`, either way.

llama.cpp has the pattern that splits text in its code, under the names of `PRE`; a tokenizer of another pattern cannot
be written. Its tokenizers do not normalize text: where ours do, text that is not in NFC becomes other tokens there.
SentencePiece's BPEs are a kind of their own, `llama`: the join of the best score first, whatever its two parts.
"""

import itertools
import json
from typing import Any

from regpt.errors import UserError
from regpt.hf.export import tokenizer_json
from regpt.hf.gguf import GGUFFile
from regpt.text.library import GEMMA_SPLIT, LibraryTokenizer
from regpt.text.llama3 import BYTES, PATTERN, split
from regpt.text.open import open_content
from regpt.text.rules import BYTE_LEVEL, ENDS_TEXT, STARTS_DOCUMENTS
from regpt.text.sentencepiece import content_of_pieces, joining_pairs
from regpt.text.spec import FALLBACK, FLAGS, SPACE, BPESpec, Json, before_every_text
from regpt.text.tokenizer import ENDOFTEXT, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types (llama.h, enum llama_token_type)
ROLES = ("eos", "eot", "eom")  # keys that name a token which ends a text
NFC: Json = {"type": "NFC"}
ESCAPE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
WORDS: Json = BYTE_LEVEL


# Name → normalizers, pre-tokenizers, whether a word that is a token is that token whatever the merges; llama-vocab.cpp.
PRE: dict[str, tuple[list[Json], list[Json], bool]] = {
    "gpt-2": ([], [WORDS], False),
    "olmo": ([NFC], [WORDS], False),  # Pythia
    "smollm": ([], [{"type": "Digits", "individual_digits": True}, WORDS], False),
    "llama-bpe": ([], [split(PATTERN), BYTES], True),
    "dbrx": ([], [split(PATTERN), BYTES], False),  # OLMo 2, cl100k
    "qwen2": ([NFC], [split(PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES], False),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx", "deepseek-r1-qwen": "qwen2"}


def tokenizer_to_gguf(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Keys of `tokenizer` for a model of `rows` tokens; ids without a token are named [PAD…], as llama.cpp does.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer_json(tokenizer))
    added = {token["id"]: token for token in content["added_tokens"]}
    names = {i: token for token, i in content["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    types = [
        UNUSED if i not in names else NORMAL if i not in added else CONTROL if added[i].get("special", True) else USER
        for i in range(rows)
    ]
    if isinstance(tokenizer, LibraryTokenizer) and not tokenizer.spec.byte_level:
        unknown = content["model"]["unk_token"]
        types = [kind if FALLBACK.fullmatch(names.get(i, "")) is None else BYTE for i, kind in enumerate(types)]
        types = [UNKNOWN if names.get(i) == unknown else kind for i, kind in enumerate(types)]
        kind = sentencepiece_keys(tokenizer.spec, {t: i for i, t in names.items() if types[i] == NORMAL}, rows)
    else:
        merges = [" ".join(merge) for merge in content["model"]["merges"]]
        kind = {"model": "gpt2", "pre": pre_of(tokenizer, content), "merges": merges}
    start, ends = tokenizer.eot, [i for i in tokenizer.stop_ids if i != tokenizer.eot] or [tokenizer.eot]
    before = isinstance(tokenizer, LibraryTokenizer) and (tokenizer.spec.template or names[start] != ENDOFTEXT)
    return {
        **{f"tokenizer.ggml.{key}": value for key, value in kind.items()},
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": start,
        **{f"tokenizer.ggml.{role}_token_id": i for role, i in zip(ROLES, ends)},
        "tokenizer.ggml.add_bos_token": before,
    }


def sentencepiece_keys(spec: BPESpec, pieces: dict[str, int], rows: int) -> Json:
    """Keys of a SentencePiece BPE whose `pieces` have ids; the ranks of its merges are scores there."""
    joined = [piece for piece, _ in itertools.groupby("".join(pair) for pair in spec.merges)]
    others = [piece for piece in pieces if piece not in {*joined}]  # single characters, which are no join
    scores = {piece: -float(rank) for rank, piece in enumerate((*joined, *others))}
    steps = [step for step in spec.normalizer if step != {"type": "Prepend", "prepend": SPACE}] + spec.pre_tokenizer
    differing = {
        "two pieces for which it lacks a merge": {*spec.merges} != {*joining_pairs(scores, pieces)},
        "merges of one piece in several places": len({*joined}) != len(joined),
        "other steps than Llama 2's": steps not in ([ESCAPE], [ESCAPE, GEMMA_SPLIT]),
        "no tokens for bytes": not spec.options.get("byte_fallback"),
        "further tokens in ordinary text": any(not token["special"] for token in spec.added),
    }
    for reason, differs in differing.items():
        if differs:
            raise UserError(
                f"llama.cpp has no tokenizer that does what this model's does, with {reason}; choose --format hf"
            )
    by_id = {pieces[piece]: score for piece, score in scores.items()}
    listed = [by_id.get(i, 0.0) for i in range(rows)]
    return {"model": "llama", "pre": "default", "scores": listed, "add_space_prefix": spec.prefix}


def pre_of(tokenizer: Tokenizer, content: Json) -> str:
    """llama.cpp's name for how `tokenizer` splits text."""
    steps = ([], [WORDS], content["model"].get("ignore_merges") is True)
    if isinstance(tokenizer, LibraryTokenizer):
        spec = tokenizer.spec
        steps = (spec.normalizer, [*map(plain_step, spec.pre_tokenizer)], steps[2])
        odd = [
            t["content"] for t in spec.added if not t["special"] and (t["lstrip"] or t["rstrip"] or t["single_word"])
        ]
        if odd:
            raise UserError(
                f"llama.cpp has no token that takes the space around it as {odd[0]!r} does; choose --format hf"
            )
    found = next((name for name, known in PRE.items() if known == steps), None)
    if found is None:
        raise UserError(
            "llama.cpp has no tokenizer that splits text as this model's does; GGUF is written with the patterns "
            f"{', '.join(PRE)}, choose --format hf"
        )
    return found


def plain_step(step: Json) -> Json:
    """A pre-tokenizer in the spelling of `PRE`: one that removes all but its matches isolates them."""
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Removed", True):
        step = step | {"behavior": "Isolated", "invert": False}
    return step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step


def tokenizer_from_gguf(file: GGUFFile, rows: int) -> Tokenizer:
    """The tokenizer of a file whose embedding has `rows` rows, unused ones at the end left out.

    Raises:
        UserError: it holds none, one that regpt does not read, or another number of tokens.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise file.error(
            f"has a tokenizer of the kind {kind!r}, regpt reads gpt2 (byte-level BPE) and llama (SentencePiece's BPE)",
            "choose another model",
        )
    if len(tokens := lists(file, "tokens")) != rows:
        raise file.error(f"contradicts itself: it has {len(tokens)} tokens, its embedding has {rows} rows")
    content = byte_level_content if kind == "gpt2" else sentencepiece_content
    return open_content(lambda: content(file), f"the tokenizer of {str(file.path)!r}")


def sentencepiece_content(file: GGUFFile) -> Json:
    """Contents of a `tokenizer.json`; unused ids are padding of the vocabulary, at its end."""
    names, types, scores = (lists(file, key) for key in ("tokens", "token_type", "scores"))
    used = len(names) - len([*itertools.takewhile(lambda kind: kind == UNUSED, reversed(types))])
    if not len(types) == len(scores) == len(names) or UNUSED in types[:used] or len({*names[:used]}) < used:
        raise file.error("contradicts itself: tokens, types and scores differ in number, or a token is there twice")
    bos, eos = (file.metadata.get(f"tokenizer.ggml.{role}_token_id", i) for role, i in (("bos", 1), ("eos", 2)))
    if not all(type(i) is int and 0 <= i < used for i in (bos, eos)) or not all(isinstance(t, str) for t in names[:1]):
        raise file.error(f"contradicts itself: its bos and eos tokens are {bos!r} and {eos!r}, of {used} names")
    flags = {"prefix": "add_space_prefix", "template": "add_bos_token"}
    options = {name: file.metadata.get(f"tokenizer.ggml.{key}", True) is True for name, key in flags.items()}
    return content_of_pieces(names[:used], scores[:used], types[:used], bos=bos, eos=eos, **options)


def byte_level_content(file: GGUFFile) -> Json:
    """Contents of a `tokenizer.json`."""
    names, types, merges = (lists(file, key) for key in ("tokens", "token_type", "merges"))
    if len(types) != len(names):
        raise file.error(f"contradicts itself: it has {len(names)} tokens and types of {len(types)}")
    pre = file.metadata.get("tokenizer.ggml.pre")
    normalizers, splitting, whole_words = PRE.get(ALIASES.get(str(pre), str(pre)), (None, None, None))
    if splitting is None:
        raise file.error(f"splits text as {pre!r}, regpt reads {', '.join((*PRE, *ALIASES))}", "choose another model")
    base = {name: i for i, (name, kind) in enumerate(zip(names, types)) if kind == NORMAL}
    added = [
        {"id": i, "content": name, **dict.fromkeys(FLAGS, False), "special": kind != USER}
        for i, (name, kind) in enumerate(zip(names, types))
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    if len(base) + len(added) != len({*base, *(token["content"] for token in added)}) or not added:
        raise file.error(
            "contradicts itself: tokens without a type that is known, without a name of their own, or none special"
        )
    template = with_roles(file, names, added)
    return {
        "added_tokens": added,
        "normalizer": normalizers[0] if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitting} if len(splitting) > 1 else splitting[0],
        "post_processor": template,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": whole_words, "vocab": base, "merges": merges},
    }


def with_roles(file: GGUFFile, names: list[Any], added: list[Json]) -> Json | None:
    """Flag the tokens that start a document and end a text; the post-processor that puts the first before a text."""
    ids = {role: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", *ROLES)}
    for role, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < len(names)):
            raise file.error(f"contradicts itself: its {role} token is {i!r}, and it has {len(names)} tokens")
    before = file.metadata.get("tokenizer.ggml.add_bos_token", False) is True
    start = ids["bos"] if ids["bos"] is not None else ids["eos"]
    before_all = before or ENDOFTEXT not in {token["content"] for token in added}
    for token in added:
        token[STARTS_DOCUMENTS] = before_all and token["id"] == start
        token[ENDS_TEXT] = token["id"] in [ids[role] for role in ROLES]
    return before_every_text(names[start], start) if before and start is not None else None


def lists(file: GGUFFile, key: str) -> list[Any]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or len({type(item) for item in value}) > 1:
        raise file.error(f"has no list tokenizer.ggml.{key}, which a tokenizer needs")
    return value
