"""Small tokenizers with the files of today's models: pre-tokenizers, normalizers, templates and special tokens."""

from __future__ import annotations

import base64
import functools
import json
import random
import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    *("The quick brown fox jumps over the lazy dog.", "Größe, Straße — „ja“.", "Где находится библиотека?"),
    *(
        "東京は日本の首都です。",
        "今天天气很好，我们去公园。",
        "안녕하세요 세계",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "שלום עולם",
    ),
    *("Ελλάδα και Κύπρος", "ข้อความภาษาไทย", "Tiếng Việt có dấu", "👩‍👩‍👧 🙂🏽", "def f(x):\n    return x**2  # código"),
    *("é e\u0301 ﬁ ½ ²", "\t\ttabs\r\nCRLF\r\n\r\n", "1234567890 3.14159 1,000,000", "I'm you're WE'LL don't"),
    *(
        "<s> </s> <|endoftext|> [INST]<0x0A>",
        "   leading",
        "trailing   ",
        "\u200b\u00a0\u3000\ufeff",
        "a_b _x_ x\n\n\n",
    ),
]
CHARACTERS = [*range(32, 127), *range(0x300), 0x301, 0x3042, 0x65E5, 0xAC00, 0xD7A3, 0x1F642, 0x1F3FD, 10, 13, 32, 32]

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def texts(n: int, seed: int = 0, lines: list[str] = LINES) -> list[str]:
    """Lines of many languages joined by white space, pieces of them, and random characters."""
    draw, made = random.Random(seed), []
    for k in range(n):
        if k % 4 < 2:
            spaces = ["", " ", "\n", "  ", "\n\n", "\t", " " * 9]
            made.append("".join(draw.choice(lines) + draw.choice(spaces) for _ in range(draw.randint(1, 5))))
        elif k % 4 == 2:
            line = draw.choice(lines) * 2
            start = draw.randint(0, len(line))
            made.append(line[start : start + draw.randint(0, 20)])
        else:
            made.append("".join(chr(draw.choice(CHARACTERS)) for _ in range(draw.randint(0, 25))))
    return made


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def before(token: str, i: int | None) -> processors.PostProcessor:
    """A post-processor that puts the special token `token` before a text."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, i)]
    )


def byte_level(splitting: Any, special: list[str], normalizer: Any = None, **options: Any) -> Tokenizer:
    """A byte-level BPE of about 400 tokens, trained on `LINES`, with its special tokens last."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitting, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def pieces(normalizer: Any, splitting: Any, joining: Any, special: list[str], plain: list[str]) -> Tokenizer:
    """A BPE with SentencePiece's spelling: special tokens, 256 bytes, characters and the merges of `LINES`."""
    spelled = [line.replace(" ", "▁") for line in LINES]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(  # no merge crosses the end of a line, in whatever order they tie
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
    )
    learner.train_from_iterator(
        spelled * 3, trainers.BpeTrainer(vocab_size=260, limit_alphabet=120, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    learned = [token for token in ("▁", *model["vocab"]) if "<" not in token and token != "\n"]
    names = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *plain, *learned])
    vocab = {token: i for i, token in enumerate(names)}
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair) in vocab and all(part in vocab for part in pair)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitting, joining
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def llama2() -> Tokenizer:
    joining = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = pieces(spaces, None, joining, ["<unk>", "<s>", "</s>"], [])
    tokenizer.post_processor = before("<s>", 1)
    return tokenizer


def mistral() -> Tokenizer:
    """As transformers writes Llama's and Mistral's since it has no `legacy` behaviour."""
    joining = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer = pieces(None, spaces, joining, ["<unk>", "<s>", "</s>"], [])
    tokenizer.post_processor = before("<s>", 1)
    return tokenizer


def gemma() -> Tokenizer:
    joining = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    splitting = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
    tokenizer = pieces(normalizers.Replace(" ", "▁"), splitting, joining, special, ["\n", "\n\n", "▁▁", "▁▁▁"])
    tokenizer.post_processor = before("<bos>", 2)
    return tokenizer


def llama3() -> Tokenizer:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(split(LLAMA3), special, ignore_merges=True)
    first = before(special[0], tokenizer.token_to_id(special[0]))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return tokenizer


def qwen() -> Tokenizer:
    tokenizer = byte_level(split(QWEN), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


def pythia() -> Tokenizer:
    tokenizer = byte_level(WORDS, ["<|endoftext|>", "<|padding|>"], normalizers.NFC())
    tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(8, 1, -1)])
    return tokenizer


def smollm() -> Tokenizer:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
    return byte_level(digits, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def tekken() -> Tokenizer:
    tokenizer = byte_level(split(TEKKEN), ["<unk>", "<s>", "</s>", "[INST]"], ignore_merges=True)
    tokenizer.post_processor = before("<s>", tokenizer.token_to_id("<s>"))
    return tokenizer


FAMILIES = {  # name → how it is made, what starts a document
    "llama3": (llama3, "<|begin_of_text|>"),
    "qwen": (qwen, "<|endoftext|>"),
    "pythia": (pythia, "<|endoftext|>"),
    "smollm": (smollm, "<|endoftext|>"),
    "olmo2": (lambda: byte_level(split(LLAMA3), ["<|endoftext|>", "<|pad|>"]), "<|endoftext|>"),
    "tekken": (tekken, "<s>"),
    "llama2": (llama2, "<s>"),
    "mistral": (mistral, "<s>"),
    "gemma": (gemma, "<bos>"),
}


@functools.cache
def file_of(family: str) -> str:
    """Contents of the family's `tokenizer.json`."""
    return FAMILIES[family][0]().to_str()


def write_family(family: str, folder: Path, **files: Any) -> Path:
    """A folder with `tokenizer.json`, and `NAME.json` for every further argument."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(file_of(family), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def oracle(text: str) -> Tokenizer:
    """The library's own tokenizer; text that spells a special token is text to it."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def tiktoken_file(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def sentencepiece_pieces() -> list[tuple[str, float, int]]:
    """(piece, score, type) of Llama 2's kind."""
    model = json.loads(file_of("llama2"))["model"]
    joined, single = ["".join(pair) for pair in model["merges"]], [token for token in model["vocab"] if len(token) == 1]
    made = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    return made + [(piece, -float(i), 1) for i, piece in enumerate(dict.fromkeys([*joined, *single]))]


def sentencepiece_file(listed: list[tuple[str, float, int]], **spec: int) -> bytes:
    """A SentencePiece model of (piece, score, type); `spec` sets `model_type` 2, `add_dummy_prefix` 1, `charsmap` 0."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    def field(number: int, value: int | float | bytes) -> bytes:
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    made = [field(1, field(1, piece.encode()) + field(2, score) + field(3, kind)) for piece, score, kind in listed]
    trainer = field(3, spec.get("model_type", 2)) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(1, b"identity") + field(3, spec.get("add_dummy_prefix", 1)) + field(4, 0)
    if spec.get("charsmap"):
        normalizer += field(2, b"map")
    return b"".join(made) + field(2, trainer) + field(3, normalizer)
