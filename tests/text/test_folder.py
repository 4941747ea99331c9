"""The tokenizer of a Hugging Face folder is what transformers makes of all its files, or a refusal that names one."""

import json
from pathlib import Path

import pytest

from regpt.errors import UserError
from regpt.text.bpe import train_bpe
from regpt.text.open import open_tokenizer

TRAINED = train_bpe(["the stone house and the cat runs under the tree, the stones\n" * 60], 275)
TEXTS = ["the stone house", "naïve 日本\n\n x", ""]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a2146" * 8 + "\nsize 3019\n"


def old_folder(folder: Path, version: str = "#version: 0.2\n", newline: str = "\n", **files: object) -> Path:
    """A folder as models from before `tokenizer.json` have it, of another language: ids in another order."""
    rules = TRAINED.rules
    vocab = {token: (i * 7 + 3) % 274 if i < 274 else i for token, i in rules.vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = version + "".join(f"{left} {right}\n" for left, right in rules.merges)
    (folder / "merges.txt").write_bytes(lines.replace("\n", newline).encode())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", [{}, {"version": ""}, {"newline": "\r\n"}, {"tokenizer_config": {}}])
def test_a_vocabulary_with_merges_is_read_as_transformers_reads_it(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    opened = open_tokenizer(old_folder(tmp_path, **form))
    (tmp_path / "merges.txt").write_text(  # with the header that transformers needs
        "#version: 0.2\n" + "\n".join(map(" ".join, TRAINED.rules.merges)) + "\n", encoding="utf-8"
    )
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert opened.encode(text) == theirs(text).input_ids != TRAINED.encode(text) or not text
    assert (opened.n_vocab, opened.eot) == (len(theirs), 274)
    assert opened.sha256 == open_tokenizer(rewritten(tmp_path, opened)).sha256


def rewritten(folder: Path, tokenizer) -> Path:
    (folder / "again").mkdir()
    (folder / "again" / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder / "again"


def test_a_folder_prefers_its_tokenizer_json(tmp_path):
    old_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TRAINED.to_json(), encoding="utf-8")
    assert open_tokenizer(tmp_path).sha256 == TRAINED.sha256


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config": {"add_prefix_space": True}}, r"tokenizer_config\.json sets add_prefix_space"),
        ({"tokenizer_config": {"add_eos_token": True}}, r"tokenizer_config\.json sets add_eos_token"),
        ({"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}, "tokenizer_class 'RobertaTokenizer'"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json' holds no JSON object"),
    ],
)
def test_an_option_that_changes_tokens_is_refused_by_name(tmp_path, files, said):
    with pytest.raises(UserError, match=said):
        open_tokenizer(old_folder(tmp_path, **files))


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pad>": 275}, "special_tokens_map": {"pad_token": {"content": "<pad>"}}},
        {"added_tokens": {"<pad>": 275}, "tokenizer_config": {"additional_special_tokens": ["<pad>"]}},
        {"tokenizer_config": {"added_tokens_decoder": {"275": {"content": "<pad>", "special": True}}}},
    ],
)
@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_special_tokens_of_the_other_files_are_special_tokens(tmp_path, files, form):
    old_folder(tmp_path, **files)
    if form == "tokenizer.json":
        (tmp_path / form).write_text(TRAINED.to_json(), encoding="utf-8")
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.n_vocab, tokenizer.decode([275])) == (276, "<pad>")
    assert max(tokenizer.encode("<pad>")) < 275


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<name>": 275}},
        {"tokenizer_config": {"added_tokens_decoder": {"275": {"content": "<name>", "special": False}}}},
    ],
)
def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path, files):
    tokenizer = open_tokenizer(old_folder(tmp_path, **files))
    stone = tokenizer.encode("the stone")
    assert tokenizer.encode("the stone<name>the stone") == [*stone, 275, *stone]
    assert tokenizer.byte_lengths()[275] == len("<name>")
    assert tokenizer.eot == 274


def test_a_bos_token_that_is_added_starts_the_documents(tmp_path):
    config = {"add_bos_token": True, "bos_token": "<bos>"}
    files = {"tokenizer_config": config, "added_tokens": {"<bos>": 275}}
    assert open_tokenizer(old_folder(tmp_path, **files)).eot == 275


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (old_folder(tmp_path) / name).write_text(POINTER, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}' is a Git LFS pointer"):
        open_tokenizer(tmp_path)


def test_what_a_folder_lacks_is_named(tmp_path):
    (old_folder(tmp_path) / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"holds vocab\.json but not the merges\.txt"):
        open_tokenizer(tmp_path)
    (tmp_path / "vocab.json").rename(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json.*it holds vocab\.txt, which regpt does not read"):
        open_tokenizer(tmp_path)


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UserError, match="more than 64 MiB"):
        open_tokenizer(tmp_path)


def test_an_end_of_text_token_of_a_chat_model_ends_a_text_and_leaves_the_identity(tmp_path):
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"275": {"content": "<|im_end|>", "special": True}}}
    chat = open_tokenizer(old_folder(tmp_path, tokenizer_config=config))
    config["eos_token"] = "<|endoftext|>"
    plain = open_tokenizer(old_folder(tmp_path, tokenizer_config=config))
    assert (chat.stop_ids, plain.stop_ids) == ((274, 275), (274,))
    assert chat.sha256 == plain.sha256
    assert open_tokenizer(rewritten(tmp_path, chat)).stop_ids == (274, 275)
