"""What is left out, and that everything else stays: short documents, duplicates, evaluation text."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.data.manifest import Manifest
from regpt.data.verify import verify
from regpt.errors import UserError
from regpt.prepare import partition
from regpt.prepare.decontaminate import N_WORDS, read_evaluations
from regpt.prepare.ngrams import WORD, ngram_hashes
from regpt.prepare.prepare import prepare
from regpt.prepare.settings import Filters
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
WORDS = "the cat sat on a mat and saw two dogs run over green hills far from any house or road".split()  # noqa: SIM905


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents(folder: Path, manifest: Manifest, split: str = "train") -> list[str]:
    texts = []
    for shard in manifest.split(split):
        tokens = np.fromfile(folder / shard.file, dtype="<u2")
        bounds = [*np.fromfile(folder / shard.idx_file, dtype="<i8"), len(tokens)]
        texts += [TOKENIZER.decode(tokens[a + 1 : b].tolist()) for a, b in zip(bounds, bounds[1:])]  # noqa: RUF007
    return texts


def removed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text(encoding="utf-8").splitlines()]


def at(source: str, document: int) -> dict:
    """A document in `removed.jsonl`."""
    return {"source": source, "file": source, "document": document}


def sentence(chosen: random.Random, words: int) -> str:
    return " ".join(chosen.choices(WORDS, k=words))


def test_short_documents_are_left_out_and_counted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["cat", "ähm", "", "the mat", "mats"])
    manifest = prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0, filters=Filters(min_chars=4))
    assert documents(tmp_path / "out", manifest) == ["the mat", "mats"]
    assert manifest.removed == {"short": {"documents": 2, "text_bytes": 7}}
    assert (manifest.sources[0]["documents"], manifest.sources[0]["empty"]) == (4, 1)
    assert manifest.text_bytes == {"train": 11, "val": 0}
    with pytest.raises(UserError, match="every document was left out by --min-chars, --dedup or --decontaminate"):
        prepare([source], tmp_path / "none", TOKENIZER, val_fraction=0, filters=Filters(min_chars=99))
    assert not (tmp_path / "none").exists()


@given(
    texts=st.lists(st.sampled_from(["a cat", "a mat", "the dog", "x", "on and on"]), min_size=1, max_size=30),
    size=st.integers(1, 300),
    share=st.sampled_from([0, 0.5]),
)
@settings(deadline=None, max_examples=40)
def test_the_first_of_equal_documents_stays(tmp_path_factory, texts, size, share):
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "MIN_BYTES", size)
        try:
            manifest = prepare([source], folder / "out", TOKENIZER, val_fraction=share, filters=Filters(dedup="exact"))
        except UserError as error:  # too few different texts for two splits
            assert share
            assert "validation split" in str(error) or "one document" in str(error)  # noqa: PT017
            return
    kept = documents(folder / "out", manifest), documents(folder / "out", manifest, "val")
    assert [text for text in dict.fromkeys(texts) if text in kept[0]] == kept[0]
    assert sorted(kept[0] + kept[1]) == sorted(set(texts))
    dropped = len(texts) - len(set(texts))
    assert manifest.removed.get("exact_duplicates", {"documents": 0})["documents"] == dropped
    assert sum(manifest.text_bytes.values()) == sum(len(text) for text in set(texts))
    assert verify(folder / "out") == []


def test_equal_texts_are_removed_across_the_splits_that_sources_make(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the mat"])
    val = write_jsonl(tmp_path / "b.jsonl", ["the mat", "a dog", "a dog"])
    manifest = prepare([train], tmp_path / "out", TOKENIZER, val_sources=[val], filters=Filters(dedup="exact"))
    assert documents(tmp_path / "out", manifest, "val") == ["a dog"]
    assert manifest.removed == {"exact_duplicates": {"documents": 2, "text_bytes": 12}}
    assert removed(tmp_path / "out") == [
        {**at(val, 0), "reason": "exact_duplicate", "of": at(train, 1)},
        {**at(val, 2), "reason": "exact_duplicate", "of": at(val, 1)},
    ]


def jaccard(one: str, other: str) -> float:
    """Share of the runs of five words, by hand."""
    runs = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (one.split(), other.split())]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_duplicates_are_removed_and_named(tmp_path, monkeypatch):
    pytest.importorskip("datasketch")
    monkeypatch.setattr(partition, "MIN_BYTES", 2000)
    chosen = random.Random(3)
    originals = [sentence(chosen, 200) for _ in range(8)]
    changed = [text.replace(".", "") + " and one more word" for text in originals[:4]]
    half = [text[: len(text) // 2] + sentence(chosen, 100) for text in originals[4:]]
    assert min(map(jaccard, originals, changed)) > 0.95
    assert max(map(jaccard, originals[4:], half)) < 0.5
    sources = [
        write_jsonl(tmp_path / "a.jsonl", ["", *originals]),
        write_jsonl(tmp_path / "b.jsonl", [*half, "", *changed, originals[0], "cat", "cat sat"]),
    ]
    written = []
    for workers in (1, 2):
        monkeypatch.setattr("regpt.prepare.workers.SMALL_BYTES", 0)
        out = tmp_path / f"out{workers}"
        manifest = prepare(sources, out, TOKENIZER, val_fraction=0, workers=workers, filters=Filters(dedup="near"))
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert documents(out, manifest) == [*originals, *half, "cat", "cat sat"]
    assert {reason: count["documents"] for reason, count in manifest.removed.items()} == {
        "exact_duplicates": 1,
        "near_duplicates": 4,
    }
    near = [{**at(sources[1], 5 + i), "reason": "near_duplicate", "of": at(sources[0], 1 + i)} for i in range(4)]
    exact = {**at(sources[1], 9), "reason": "exact_duplicate", "of": at(sources[0], 1)}
    assert removed(out) == [*near, exact]
    assert verify(out) == []


QUESTION = "A man is sitting on a roof. He starts pulling up roofing, and then he looks down at the street"


def test_documents_with_evaluation_text_are_removed_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "MIN_BYTES", 100)
    chosen = random.Random(4)
    filler = sentence(chosen, 30)
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"label": 3, "ctx": "too short"}) + "\n\n" + json.dumps({"ctx": ["x", {"y": QUESTION}]}) + "\n",
        encoding="utf-8",
    )
    (tmp_path / "more.txt").write_text(filler, encoding="utf-8")
    words = QUESTION.split()
    texts = [
        "",
        f"{filler[:20]} {' '.join(words[2:15]).upper().replace(' ', ' - ')}!",
        f"Before. {' '.join(words[2:14])} and after",  # twelve words in a row
        filler,
        " ".join(reversed(words)),
    ]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    given = tuple(str(tmp_path / name) for name in ("items.jsonl", "more.txt"))
    out = tmp_path / "out"
    manifest = prepare([source], out, TOKENIZER, val_fraction=0, filters=Filters(decontaminate=given))
    assert documents(out, manifest) == [texts[2], texts[4]]
    assert manifest.removed["contaminated"]["documents"] == 2
    line = {"source": source, "file": source, "reason": "contaminated"}
    assert removed(out) == [
        {**line, "document": 1, "items": [{"file": given[0], "item": 1}]},
        {**line, "document": 3, "items": [{"file": given[1], "item": 0}]},
    ]
    files = manifest.options["decontaminate"]
    assert [(file["items"], file["too_short"]) for file in files] == [(2, 1), (1, 0)]


@given(
    st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=40), min_size=1, max_size=5),
    st.lists(st.sampled_from("ab"), max_size=60),
)
@settings(deadline=None, max_examples=60)
def test_the_items_found_are_those_that_share_thirteen_words(tmp_path_factory, items, words):
    path = tmp_path_factory.mktemp("eval") / "items.jsonl"
    path.write_text("".join(json.dumps(" ".join(item)) + "\n" for item in [*items, ["c"] * 13]), encoding="utf-8")
    found = read_evaluations([str(path)]).find(" ".join(words))
    runs = {tuple(words[i : i + N_WORDS]) for i in range(len(words) - N_WORDS + 1)}
    expected = [
        k for k, item in enumerate(items) if any(tuple(item[i : i + N_WORDS]) in runs for i in range(len(item) - 12))
    ]
    assert found == expected


def test_runs_of_words_do_not_depend_on_where_a_long_text_is_cut(monkeypatch):
    text = sentence(random.Random(1), 500) + " Ünïcode, déjà-vu_1 ②!"
    whole = ngram_hashes(text, 1)
    monkeypatch.setattr("regpt.prepare.ngrams.BLOCK_CHARS", 30)
    assert np.array_equal(ngram_hashes(text, 1), whole)
    assert len(whole) == len(WORD.findall(text))
    assert WORD.findall(text)[-5:] == ["Ünïcode", "déjà", "vu", "1", "②"]
    assert len(ngram_hashes(text, 13)) == len(whole) - 12
    assert len(np.unique(ngram_hashes(" ".join(WORD.findall(text)[:5]), 2))) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "is not an evaluation file"),
        ("a.docx", "x", "is not an evaluation file; give files of .txt"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"a": "b"}\n', "holds no text of 13 words to look for"),
    ],
)
def test_a_file_that_is_no_evaluation_is_one_sentence(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    source = write_jsonl(tmp_path / "s.jsonl", ["the cat", "the mat"])
    filters = Filters(decontaminate=(str(tmp_path / name),))
    with pytest.raises(UserError, match=said):
        prepare([source], tmp_path / "out", TOKENIZER, val_fraction=0, filters=filters)
    assert not (tmp_path / "out").exists()
