"""Text → shards: exactly the documents, in order, whatever the shards, the workers and the way it was interrupted."""

import errno
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regpt.data.manifest import Manifest, read_manifest
from regpt.data.verify import verify
from regpt.errors import UsageError, UserError
from regpt.prepare import encode, shards
from regpt.prepare.ngrams import cut
from regpt.prepare.prepare import Progress, prepare
from regpt.prepare.settings import TextOptions
from regpt.prepare.split import fraction
from regpt.text import gpt2
from regpt.text.bpe import BPETokenizer, train_bpe
from regpt.text.tokenizer import Tokenizer

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)


class WideTokenizer(BPETokenizer):
    """The same with its ids moved up, so that they need 32 bits."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.to_json())
        self.n_vocab, self.eot = 70_000, 69_999

    def encode_batch(self, texts, threads=1):
        return [ids + np.uint32(69_000) for ids in super().encode_batch(texts, threads)]


def hash_fraction(text: str) -> float:
    return fraction(sha256(text.encode()).digest())


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def stream(folder: Path, manifest: Manifest, split: str) -> tuple[np.ndarray, list[int]]:
    """All tokens of a split, and where its documents start: read by the format's description, not by our reader."""
    tokens, starts, offset = [], [], 0
    for shard in manifest.split(split):
        data = (folder / shard.file).read_bytes()
        part = np.frombuffer(data, dtype="<u2" if manifest.dtype == "uint16" else "<u4")
        index = np.frombuffer((folder / shard.file.replace(".bin", ".idx")).read_bytes(), dtype="<i8")
        starts += (index + offset).tolist()
        tokens.append(part)
        offset += len(part)
    return np.concatenate(tokens) if tokens else np.array([], dtype="<u2"), starts


def documents(folder: Path, manifest: Manifest, split: str, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    tokens, starts = stream(folder, manifest, split)
    bounds = [*starts, len(tokens)]
    assert all(tokens[start] == manifest.eot for start in starts)
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in zip(bounds, bounds[1:])]  # noqa: RUF007


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=12).filter(any),
    shard_tokens=st.integers(1, 40),
    workers=st.integers(1, 2),
)
@settings(deadline=None, max_examples=60)
def test_the_stream_is_the_documents_in_order(tmp_path_factory, texts, shard_tokens, workers):
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "a.jsonl", texts)
    out = folder / "out"
    manifest = prepare([source], out, TOKENIZER, val_fraction=0, shard_tokens=shard_tokens, workers=workers)
    kept = [text for text in texts if text]
    assert documents(out, manifest, "train") == kept
    assert read_manifest(out) == manifest
    assert verify(out) == []
    tokens, starts = stream(out, manifest, "train")
    assert [shard.tokens for shard in manifest.shards[:-1]] == [shard_tokens] * (len(manifest.shards) - 1)
    borders = np.cumsum([shard.tokens for shard in manifest.shards])
    assert [shard.continues for shard in manifest.shards] == [end not in {*starts, len(tokens)} for end in borders]
    assert manifest.text_bytes == {"train": sum(len(text.encode()) for text in kept), "val": 0}
    assert manifest.sources[0]["empty"] == len(texts) - len(kept)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=20, max_size=40, unique=True))
@settings(deadline=None, max_examples=20)
def test_the_split_is_by_the_documents_own_text(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "a.jsonl", texts)
    held = [text for text in texts if hash_fraction(text) < 0.5]
    if 0 < len(held) < len(texts):
        manifest = prepare([source], folder / "out", TOKENIZER, val_fraction=0.5, workers=1)
        assert documents(folder / "out", manifest, "val") == held
        assert documents(folder / "out", manifest, "train") == [text for text in texts if text not in held]


def test_the_hash_of_the_split_is_the_documented_one():
    # SHA-256 of "abc" begins ba7816bf8f01cfea (FIPS 180-2).
    assert hash_fraction("abc") == 0xBA7816BF8F01CFEA / 2**64


def test_copies_of_a_document_share_its_split(tmp_path):
    texts = [f"document {i} of the cats\n" for i in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts)
    manifest = prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0.3)
    train, val = (documents(tmp_path / "out", manifest, split) for split in ("train", "val"))
    assert len(val) % 2 == 0
    assert not set(train) & set(val)


@pytest.mark.parametrize("shard_tokens", [7, 100_000])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(encode, "PIECE_CHARS", 50)
    monkeypatch.setattr(encode, "BATCH_CHARS", 50)
    texts = [f"the cat {i} sat " * (i % 13) + "on the mat" for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    written = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        prepare([source], out, TOKENIZER, val_fraction=0.2, shard_tokens=shard_tokens, workers=workers)
        written.append(contents(out))
    assert written[0] == written[1] == written[2]
    assert "train-00000.bin" in written[0]


@given(st.text(st.sampled_from("a \n\n\t's1.日\x1c\u00a0"), max_size=60), st.integers(1, 8))
@example("a\n\n\nb", 2)
@settings(deadline=None, max_examples=300)
def test_text_cut_in_parts_has_the_tokens_of_the_whole(text, limit):
    parts = list(cut(text, limit))
    assert "".join(parts) == text
    tokenizers: list[Tokenizer] = [TOKENIZER]
    if gpt2.find_vocabulary(gpt2.VOCAB_PACKAGE):
        tokenizers.append(gpt2.load_gpt2())
    for tokenizer in tokenizers:
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_long_text_is_cut_often_enough():
    assert max(map(len, cut("the cat sat on the mat " * 100, 50))) < 60


def test_a_single_document_is_cut_after_a_line(tmp_path):
    lines = [f"line {i}\n" for i in range(50)]
    (tmp_path / "a.txt").write_bytes("".join(lines).encode())
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", TOKENIZER)
    train, val = (documents(tmp_path / "out", manifest, split) for split in ("train", "val"))
    assert train[0] + val[0] == "".join(lines)
    assert train[0].endswith("\n")
    assert 0.08 < len(val[0]) / len("".join(lines)) <= 0.13
    assert manifest.options["val_rule"] == "cut"


def test_a_single_line_cannot_be_cut(tmp_path):
    (tmp_path / "a.txt").write_text("one line without an end", encoding="utf-8")
    with pytest.raises(UserError, match=r"'.*a\.txt' holds one document of one line"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", TOKENIZER)


def test_validation_sources_are_held_out_whole(tmp_path):
    train, val = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"]), write_jsonl(tmp_path / "b.jsonl", ["sat"])
    manifest = prepare([train], tmp_path / "out", TOKENIZER, val_sources=[val])
    assert documents(tmp_path / "out", manifest, "train") == ["the cat", "the mat"]
    assert documents(tmp_path / "out", manifest, "val") == ["sat"]
    assert [(source["split"], source["documents"]) for source in manifest.sources] == [("train", 2), ("val", 1)]


def test_a_large_vocabulary_is_written_in_32_bits(tmp_path):
    tokenizer = WideTokenizer()
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    manifest = prepare([source], tmp_path / "out", tokenizer, val_fraction=0)
    tokens, _ = stream(tmp_path / "out", manifest, "train")
    assert (manifest.dtype, int(tokens.max())) == ("uint32", 69_999)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 4 * len(tokens)


def test_the_trained_tokenizer_lies_beside_the_shards(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    manifest = prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes().decode() == TOKENIZER.to_json()
    assert (manifest.tokenizer, manifest.tokenizer_sha256) == (TOKENIZER.name, TOKENIZER.sha256)
    assert (manifest.vocab_size, manifest.eot) == (270, 269)


def test_progress_ends_with_everything(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    seen: list[Progress] = []
    manifest = prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0, progress=seen.append)
    assert seen[-1] == Progress(documents=2, text_bytes=14, tokens=manifest.tokens("train"), done=1.0)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_killed_preparation_is_not_accepted_and_can_be_repeated(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [f"the cat {i}" for i in range(30)])
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare([source], whole, TOKENIZER, val_fraction=0, shard_tokens=20)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_text", killed)  # everything is written but the manifest
        with pytest.raises(Killed):
            prepare([source], out, TOKENIZER, val_fraction=0, shard_tokens=20)
    (out / "train-00099.bin.partial").write_bytes(b"half")
    (out / "mine.md").write_text("the user's own", encoding="utf-8")
    assert (out / "train-00003.bin").is_file()
    with pytest.raises(UserError, match="never finished"):
        read_manifest(out)
    prepare([source], out, TOKENIZER, val_fraction=0, shard_tokens=20)
    assert contents(out) == {**contents(whole), "mine.md": b"the user's own"}


def test_ctrl_c_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"the cat {i}" for i in range(30)])

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0, shard_tokens=20, progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_a_bad_source_leaves_nothing(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not valid UTF-8"):
        prepare([good, str(tmp_path / "b.txt")], tmp_path / "out", TOKENIZER, val_fraction=0)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_not_touched_again(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    more, out = write_jsonl(tmp_path / "b.jsonl", ["a mat"]), tmp_path / "out"
    made = prepare([source, more], out, TOKENIZER, val_fraction=0, shard_tokens=7)
    before = contents(out)
    assert prepare([source, more], out, TOKENIZER, val_fraction=0, shard_tokens=7, workers=2, encoder="exact") == made
    other = write_jsonl(tmp_path / "c.jsonl", ["the cat"])
    for names, options, said in (
        ([source, more], {"shard_tokens": 8}, r"with another shard tokens \(7, now 8\)"),
        ([source, more], {"val_fraction": 0.1}, r"with another val rule \(none, now documents\)"),
        ([source, more], {"text": TextOptions(on_error="skip")}, r"with another on error \(stop, now skip\)"),
        ([source], {}, r"with .*b\.jsonl in .* for train"),
        ([source, more, other], {}, r"without .*c\.jsonl in .* for train"),
        ([more, source], {}, "from the sources in another order"),
    ):
        with pytest.raises(UserError, match=rf"already holds a data set, made {said}.*regpt data info"):
            prepare(names, out, TOKENIZER, **{"val_fraction": 0, "shard_tokens": 7, **options})
    with pytest.raises(UserError, match="made with another --tokenizer"):
        prepare([source, more], out, train_bpe(["a b " * 9], 258), val_fraction=0, shard_tokens=7)
    write_jsonl(tmp_path / "b.jsonl", ["a cat"])
    with pytest.raises(UserError, match=r"made when .*b\.jsonl had other content"):
        prepare([source, more], out, TOKENIZER, val_fraction=0, shard_tokens=7)
    assert contents(out) == before
    with pytest.raises(UserError, match="is a file; give a folder"):
        prepare([source], Path(source), TOKENIZER)


def test_a_source_without_text_is_named(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    for name, content in (("b.txt", ""), ("c.jsonl", ""), ("d.jsonl", '{"text": ""}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=f"{name[0]}.*' holds no text"):
            prepare([good, str(tmp_path / name)], tmp_path / "out", TOKENIZER, val_fraction=0)


def test_where_errors_are_skipped_one_source_without_text_does_not_stop_the_others(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"]), tmp_path / "b.txt"
    bad.write_bytes(b"caf\xe9")
    options = {"val_fraction": 0, "text": TextOptions(on_error="skip")}
    manifest = prepare([good, str(bad)], tmp_path / "out", TOKENIZER, **options)
    assert manifest.documents("train") == 2
    assert manifest.removed["not_utf8"]["documents"] == 1
    with pytest.raises(UserError, match="holds no text"):
        prepare([str(bad)], tmp_path / "none", TOKENIZER, **options)


def test_an_empty_split_says_which_fraction_would_do(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat", "the cats"])
    with pytest.raises(UserError, match="none of the 3 documents fell into the validation split") as error:
        prepare([source], tmp_path / "out", TOKENIZER, val_fraction=1e-6)
    advised = float(str(error.value).split("use --val-fraction ")[1].split(",")[0])
    prepare([source], tmp_path / "out", TOKENIZER, val_fraction=advised)
    with pytest.raises(UserError, match="all 3 documents fell into the validation split"):
        prepare([source], tmp_path / "out2", TOKENIZER, val_fraction=0.999999)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_fraction": 1.0}, "--val-fraction is 1.0, must be at least 0 and below 1"),
        ({"val_fraction": float("nan")}, "--val-fraction is nan"),
        ({"shard_tokens": 0}, "--shard-tokens is 0, must be at least 1"),
        ({"workers": 0}, "--workers is 0, must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_written(tmp_path, options, said):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    with pytest.raises(UsageError, match=said):
        prepare([source], tmp_path / "out", TOKENIZER, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no SOURCE given"):
        prepare([], tmp_path / "out", TOKENIZER)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    with pytest.raises(UserError, match=r"out cannot be made \(.+\); choose another folder"):
        prepare([source], tmp_path / "a.jsonl" / "out", TOKENIZER, val_fraction=0)


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare([source], whole, TOKENIZER, val_fraction=0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "finish_file", full)
        with pytest.raises(UserError, match=r"the disk of .* is full; free space, then the same command goes on"):
            prepare([source], out, TOKENIZER, val_fraction=0)
    with pytest.raises(UserError, match="never finished"):
        read_manifest(out)
    prepare([source], out, TOKENIZER, val_fraction=0)
    assert contents(out) == contents(whole)


def test_what_is_skipped_or_may_be_a_mistake_is_counted(tmp_path):
    """With workers and after a stop the bytes are the same: the counts, too."""
    rows = ["the cat\r\nsat", "a mat<|endoftext|>the cat<|endoftext|>"]
    lines = [json.dumps({"text": rows[i % 2]}) if i % 5 else "{oops" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("the cat sat " * 90_000, encoding="utf-8")
    options = {"val_fraction": 0.0, "text": TextOptions(on_error="skip"), "shard_tokens": 50_000}
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    manifest = prepare(names, tmp_path / "out", TOKENIZER, **options)
    first, second = manifest.sources
    assert first["byte_order_mark"] == 1
    assert {name: first[name] for name in ("documents", "empty", "skipped", "crlf", "endoftext")} == {
        "documents": 40,
        "empty": 0,
        "skipped": 10,
        "crlf": 20,
        "endoftext": 40,
    }
    assert second["long_lines"] == 1
    assert "crlf" not in second
    assert manifest.options["on_error"] == "skip"
    assert manifest.removed == {"not_json": {"documents": 10, "text_bytes": 0}}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert [line["document"] for line in skipped] == [*range(0, 50, 5)]
    assert skipped[1]["reason"] == "not_json"
    assert "line 6: not JSON" in skipped[1]["error"]
    prepare(names, tmp_path / "out2", TOKENIZER, workers=2, **options)
    assert contents(tmp_path / "out2") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a.txt"], {"text": TextOptions(text_column="body")}, "--text-column is about columns, and no source has any"),
        (["a.txt", "b.md.gz"], {"text": TextOptions(template="{a}")}, "--template is about columns, and no source has"),
        (["a.jsonl"], {"text": TextOptions(separator="---")}, "--separator cuts plain text into documents, and no"),
        (
            ["a.txt"],
            {"val_sources": ["b.txt"], "val_fraction": 0.1},
            "--val-fraction a part of the documents; give one",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, names, options, said):
    for name in {*names, "b.txt"}:
        (tmp_path / name).write_text('{"text": "a"}\n')
    options |= {key: [str(tmp_path / name) for name in options[key]] for key in ("val_sources",) if key in options}
    with pytest.raises(UsageError, match=said):
        prepare([str(tmp_path / name) for name in names], tmp_path / "out", TOKENIZER, **options)
    assert not (tmp_path / "out").exists()


def test_an_option_of_some_of_the_sources_is_taken(tmp_path):
    (tmp_path / "a.txt").write_text("one\n--\ntwo")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n')
    text = TextOptions(text_column="body", separator="--")
    assert prepare([str(tmp_path)], tmp_path / "out", TOKENIZER, val_fraction=0, text=text).documents("train") == 3
