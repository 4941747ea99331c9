"""`tokenizer.model`: Llama 3's is tiktoken's format, Llama 2's and Mistral's a protobuf of SentencePiece."""

import itertools

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import UserError
from regpt.text import gpt2
from regpt.text.gpt2 import find_vocabulary, ranks_from_files
from regpt.text.llama3 import NAMED_3_0, NAMED_3_1, PATTERN, name_special_tokens
from regpt.text.open import from_json, open_tokenizer
from tokenizer_files import LLAMA3, sentencepiece_file, sentencepiece_pieces, texts, tiktoken_file

VOCABULARY = find_vocabulary(gpt2.VOCAB_PACKAGE)
needs_gpt2 = pytest.mark.skipif(VOCABULARY is None, reason="extra offline is not installed")


def llama3_tokens() -> list[bytes]:
    """128,000 tokens: GPT-2's, then their pairs, so that each is two earlier ones."""
    assert VOCABULARY
    ranks = ranks_from_files(VOCABULARY)
    tokens = sorted(ranks, key=ranks.__getitem__)
    draw, known = np.random.default_rng(0), set(tokens)
    for left, right in draw.integers(len(tokens), size=(200_000, 2)).tolist():
        joined = tokens[left] + tokens[right].lstrip()
        if len(tokens) < 128_000 and joined not in known:
            tokens.append(joined)
            known.add(joined)
    return tokens


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """The folder of such a file, and tiktoken's own encoding of it."""
    tokens, folder = llama3_tokens(), tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes(tiktoken_file(tokens))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return folder, theirs


@needs_gpt2
def test_llama3s_file_gives_the_ids_of_tiktoken(llama3):
    folder, theirs = llama3
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    words = [theirs.decode([i]) for i in range(60_000, 128_000, 50)]  # taken whole, whatever the merges make of them
    made = [*texts(2000), *words]
    assert [tokenizer.encode(text) for text in made] == [theirs.encode_ordinary(text) for text in made]
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.stop_ids) == (
        128_256,
        128_000,
        (128_000, 128_001, 128_008, 128_009),
    )
    assert tokenizer.decode([128_000, 128_006, 128_010]) == "<|begin_of_text|><|start_header_id|><|python_tag|>"
    assert PATTERN == LLAMA3
    assert from_json(tokenizer.to_json()).sha256 == tokenizer.sha256


@needs_gpt2
def test_the_files_next_to_it_name_the_special_tokens(llama3):
    folder, _ = llama3
    (folder / "params.json").write_text('{"dim": 4096}', encoding="utf-8")
    try:
        tokenizer = open_tokenizer(folder)
    finally:
        (folder / "params.json").unlink()
    assert tokenizer.decode([128_004, 128_009, 128_255]) == (
        "<|reserved_special_token_2|><|eot_id|><|reserved_special_token_250|>"
    )


def test_the_special_tokens_are_those_of_metas_code():
    first = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    first += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    assert name_special_tokens(NAMED_3_0) == [*first, *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
    later = name_special_tokens(NAMED_3_1)
    assert later[4:6] == ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"]
    assert later[8:12] == ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>"]
    assert (len(later), later[-1]) == (256, "<|reserved_special_token_247|>")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            tiktoken_file([bytes([byte]) for byte in range(256)]),
            "a tiktoken file of 256 ranks, .* give the tokenizer.json",
        ),
        (b"YQ== 0\nnot base64!\n", "line 2 is not a base64 token and its rank"),
        (b"YQ== 0\nYg== 99999999999999999999999\n", "its ranks are not 0, 1, 2"),
        (b"YQ== 0\nYQ== 1\n", "its ranks are not 0, 1, 2"),
        (b"", "not a whole SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\x7fshort", "not a whole SentencePiece model"),
        (b"\xff" * 99, "not a whole SentencePiece model"),
        (sentencepiece_file([("<unk>", 0.0, 2)], model_type=1), "a Unigram model"),
        (sentencepiece_file([("<unk>", 0.0, 2)], charsmap=1), "character map"),
        (sentencepiece_file([("<unk>", 0.0, 2), ("<s>", 0.0, 3)]), "lacks some of the 256 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, content, said):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        open_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)
    assert "\n" not in str(error.value)


# ---- SentencePiece

PIECES = sentencepiece_pieces()


def sentencepiece_ids(text: str, prefix: str) -> list[int]:
    """SentencePiece's BPE by hand: the best score of all neighbours first, the leftmost of equals (bpe_model.cc)."""
    ids = {piece: i for i, (piece, _, _) in enumerate(PIECES)}
    scores = {piece: score for piece, score, kind in PIECES if kind == 1}
    parts = list((prefix + text).replace(" ", "▁")) if text else []
    while True:
        joined = [scores.get(left + right, -np.inf) for left, right in itertools.pairwise(parts)]
        if not joined or max(joined) == -np.inf:
            break
        at = int(np.argmax(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = ([ids[part]] if part in scores else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts)
    return list(itertools.chain.from_iterable(found))


@pytest.fixture(scope="module", params=[1, 0])
def sentencepiece(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(sentencepiece_file(PIECES, add_dummy_prefix=request.param))
    return open_tokenizer(folder), "▁" * request.param


def test_sentencepieces_file_gives_the_ids_of_its_algorithm(sentencepiece):
    tokenizer, prefix = sentencepiece
    for text in texts(500, seed=5):
        assert tokenizer.encode(text) == sentencepiece_ids(text, prefix)
    assert sum(len(piece) > 1 for piece, _, kind in PIECES if kind == 1) > 50


@given(st.text(max_size=30))
@settings(max_examples=100)
def test_any_text_has_the_ids_of_sentencepiece_and_comes_back(sentencepiece, text):
    tokenizer, prefix = sentencepiece
    assert tokenizer.encode(text) == sentencepiece_ids(text, prefix)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_sentencepieces_control_tokens_start_and_end_a_document(sentencepiece):
    tokenizer, _ = sentencepiece
    assert (tokenizer.eot, tokenizer.stop_ids, tokenizer.n_vocab) == (1, (1, 2), len(PIECES))
    assert from_json(tokenizer.to_json()).sha256 == tokenizer.sha256
