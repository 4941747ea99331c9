"""Passages of documents, and their ranking, against BM25 by hand."""

import json
import math
import os
import random
import re
from pathlib import Path

import pytest

from regpt.errors import UserError
from regpt.prepare import passages
from regpt.prepare.passages import PassageIndex, passages_of
from regpt.remote.download import RemoteOptions

WORDS = ["ba", "do", "mi", "ta", "ru", "ke", "zo", "lu"]  # without endings that stemming takes off


@pytest.fixture
def index(tmp_path):
    def build(name: Path) -> PassageIndex:
        return PassageIndex(str(name), RemoteOptions(tmp_path / "cache"))

    return build


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def bm25(texts: list[str], query: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Robertson and Zaragoza 2009, equation 3.15, with SQLite's lower limit of a word's weight."""
    split = [text.split() for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = [0.0] * len(texts)
    for word in query:
        n = sum(word in words for words in split)
        weight = max(1e-6, math.log((len(texts) - n + 0.5) / (n + 0.5)))
        for i, words in enumerate(split):
            tf = words.count(word)
            scores[i] += weight * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(words) / mean))
    return scores


def test_passages_are_ranked_by_bm25(tmp_path, index):
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, weights=range(1, 9), k=draw.randrange(2, 12))) for _ in range(60)]
    found = index(write_rows(tmp_path / "rows.jsonl", [{"text": one} for one in texts]))
    for _ in range(20):
        query = draw.sample(WORDS, 3)
        scores = bm25(texts, query)
        expected = sorted((i for i in range(60) if scores[i]), key=lambda i: (-round(scores[i], 9), i))[:5]
        got, passed = found.search(f"{' '.join(query)}?", 5)
        assert [one.place for one in got] == [f"rows.jsonl, row {i + 1}" for i in expected]
        assert [one.text for one in got] == [texts[i] for i in expected]
        assert passed == 0


def test_passages_cover_a_document_and_know_their_first_line():
    draw = random.Random(1)
    for _ in range(50):
        lines = [" ".join(draw.choices(WORDS, k=draw.choice([0, 3, 20, 400]))) for _ in range(draw.randrange(1, 30))]
        text = "\n".join(lines)
        found = list(passages_of(text))
        assert "".join(one for _, one in found).split() == text.split() or re.sub(r"\s", "", text) == re.sub(
            r"\s", "", "".join(one for _, one in found)
        )
        for line, one in found:
            assert len(one) <= passages.PASSAGE_CHARS * 1.25 + 2 * len(lines)
            assert one.split()[0] in lines[line - 1].split()
        short = [one for _, one in found[:-1] if len(one) < passages.PASSAGE_CHARS // 4]
        assert not short  # a heading stays with what follows


def test_the_texts_of_a_folder_are_found_with_their_file_and_line_or_row(tmp_path, index):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# Title\n\n" + "filler words. " * 56 + "\n\nThe zebra is striped.\n")
    (folder / "deep" / "b.txt").write_text("Kittens sleep.")
    write_rows(
        folder / "c.jsonl", [{"question": "who", "answer": "the giraffe"}, {"instruction": "Q", "output": "okapi"}]
    )
    (folder / "d.txt").write_bytes(b"\x00bad")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    found = index(folder)
    assert [found.search(word, 1)[0][0].place for word in ("zebras", "kitten", "giraffe", "okapi")] == [
        *("a.md, line 5", "deep/b.txt, line 1", "c.jsonl, row 1", "c.jsonl, row 2")
    ]
    assert (found.files, found.unreadable) == (4, 1)
    assert "1 document cannot be read, the first: " in found.sentence()
    assert found.search("the a of 'quoted\" AND NEAR(", 2)[0]  # nothing that a user writes is an operator
    assert found.search("?!", 2) == ([], 0)


def test_an_index_is_built_once_and_again_when_a_file_has_changed(tmp_path, index):
    path = tmp_path / "a.txt"
    path.write_text("one zebra")
    assert index(path).seconds > 0
    os.utime(path, (1, 1))
    assert index(path).seconds == 0
    path.write_text("one okapi")
    again = index(path)
    assert again.seconds > 0
    assert (again.search("okapi", 1)[0][0].text, again.search("zebra", 1)) == ("one okapi", ([], 0))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_held_out_questions_and_answers_are_passed_over(tmp_path, index):
    answer = "the okapi of the forest eats leaves and sleeps all day long"
    rows = [{"instruction": f"where is okapi {i}?", "output": f"place {i} " * 12} for i in range(40)]
    found = index(write_rows(tmp_path / "rows.jsonl", [*rows, {"text": answer}, {"text": "okapi okapi"}]))
    every, _ = found.search("okapi", 50)
    kept, passed = found.search("okapi", 50, held_out=0.3, answer=answer.upper())
    assert len(every) == 42
    assert 0 < passed < 42
    assert len(kept) == 42 - passed
    assert answer in [one.text for one in every]
    assert answer not in [one.text for one in kept]
    assert {one.text for one in kept} > {"okapi okapi"}


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_folder_without_text_is_refused_in_a_sentence(tmp_path, index, content):
    folder = tmp_path / "notes"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no readable file"):
        index(folder)
    (folder / "a.txt").write_text(content)
    with pytest.raises(UserError, match="notes' holds no text to retrieve passages from; give files with text"):
        index(folder)
    assert not list((tmp_path / "cache").rglob("*.*"))
