"""SentencePiece's `tokenizer.model` of a BPE (Llama 2, Mistral, Gemma), read without its package.

The file is a protobuf (sentencepiece_model.proto): pieces with scores and types, how they were trained, how text is
normalized. Models that normalize with a character map are refused.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, AnyStr

from regpt.text.rules import ENDS_TEXT, RESTORE, NotATokenizer
from regpt.text.spec import FLAGS, SPACE, Json, before_every_text

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # of a piece
MODEL_TYPE, BYTE_FALLBACK, BOS_ID, EOS_ID, BPE = 3, 35, 41, 42, 2  # of TrainerSpec; BPE is a model type
CHARACTER_MAP, ADD_PREFIX, REMOVE_SPACES = 2, 3, 4  # of NormalizerSpec
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces


def sentencepiece_content(data: bytes) -> Json:
    """Contents of a `tokenizer.json` with the tokens of a SentencePiece BPE.

    The merges are all pairs that make a piece, by its score, as transformers' SpmConverter lists them.

    Raises:
        UserError: a damaged file, a Unigram model, or a normalization that regpt does not implement.
    """
    try:
        fields = list(messages(data))
        pieces = [dict(messages(value)) for field, value in fields if field == PIECES]
        trainer, normalizer = (dict(messages(dict(fields)[field])) for field in (TRAINER, NORMALIZER))
        names = [piece[PIECE].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(SCORE, bytes(4)))[0] for piece in pieces]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise NotATokenizer("not a whole SentencePiece model", RESTORE) from None
    kinds = [piece.get(TYPE, NORMAL) for piece in pieces]
    if trainer.get(MODEL_TYPE, 1) != BPE:
        raise NotATokenizer("a Unigram model, and regpt reads BPE")
    if normalizer.get(CHARACTER_MAP) or normalizer.get(REMOVE_SPACES, 1) or UNUSED in kinds:
        raise NotATokenizer(
            "a SentencePiece model with a character map, removed spaces or unused pieces, which regpt lacks",
            "give the tokenizer.json that transformers' save_pretrained writes for it",
        )
    special = {"bos": trainer.get(BOS_ID, 1), "eos": trainer.get(EOS_ID, 2)}
    fallback, prefix = bool(trainer.get(BYTE_FALLBACK)), bool(normalizer.get(ADD_PREFIX, 1))
    return content_of_pieces(names, scores, kinds, **special, byte_fallback=fallback, prefix=prefix)


def content_of_pieces(
    names: list[str],
    scores: list[float],
    kinds: list[int],
    *,
    bos: int,
    eos: int,
    byte_fallback: bool = True,
    prefix: bool = True,
    template: bool = True,
) -> Json:
    """Contents of a `tokenizer.json` with these pieces; `prefix`: a space is put before a text, `template`: and the
    token `bos`."""
    ids = {name: i for i, name in enumerate(names)}
    added = [
        {"id": i, "content": names[i], **dict.fromkeys(FLAGS, False), "special": kind != USER_DEFINED}
        for i, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    for token in added:
        token[ENDS_TEXT] = token["id"] == eos
    space: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    joining = [{**space, "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    joining += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [space]},
        "post_processor": before_every_text(names[bos], bos) if template and 0 <= bos < len(names) else None,
        "decoder": {"type": "Sequence", "decoders": joining},
        "model": {
            "type": "BPE",
            "unk_token": next((name for name, kind in zip(names, kinds) if kind == UNKNOWN), None),
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "vocab": ids,
            "merges": list(joining_pairs({name: scores[i] for name, i in ids.items() if kinds[i] == NORMAL}, ids)),
        },
    }


def joining_pairs(scores: Mapping[AnyStr, float], ids: Mapping[AnyStr, int]) -> Iterator[tuple[AnyStr, AnyStr]]:
    """Every pair of pieces whose join is a piece, the best score of the join first."""
    for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece])):
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found = (pair for pair in halves if pair[0] in scores and pair[1] in scores)
        yield from sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value of each field of a protobuf message: bytes, or a whole number."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
            value, at = data[at : at + size], at + size
        elif key & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("a wire type that the format has not")
        if at > len(data):
            raise ValueError("a field longer than its message")
        yield key >> 3, value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The whole number at `at`, seven bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at + shift // 7] & 127) << shift
        if data[at + shift // 7] < 128:
            return value, at + shift // 7 + 1
    raise ValueError("a whole number of more than ten bytes")
