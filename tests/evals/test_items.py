import gzip
import json
from pathlib import Path

import pytest

from regpt.errors import UserError
from regpt.evals.items import Item, read_items


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
    return path


def test_items_are_the_lines_and_know_where_they_stand(tmp_path):
    items = read_items(write(tmp_path / "a.jsonl", {"a": 1}, "", {"b": "é"}))
    assert [item.row for item in items] == [{"a": 1}, {"b": "é"}]
    assert items[1].where.endswith("a.jsonl, line 3")


def test_compressed_files_are_read_alike(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b'{"a": 1}\n{"a": 2}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [item.row["a"] for item in read_items(tmp_path / name)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n[1]\n', r"line 2: not a JSON object"),
        ('{"a": 1}\n{"a": \n', r"line 2: not JSON"),
        ("\n\n", r"holds no item"),
        (b"\xff\n", r"line 1: byte 0xff is not valid UTF-8"),
    ],
)
def test_a_malformed_file_is_told_where(tmp_path, content, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        read_items(path)


def test_a_missing_file_and_one_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist"):
        read_items(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match=r"holds no items; allowed are .jsonl"):
        read_items(tmp_path / "a.csv")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"damaged"):
        read_items(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("row", "ask", "said"),
    [
        ({"b": 1}, lambda item: item.get("a", str), "f, line 1: the item has no 'a', it has b"),
        ({}, lambda item: item.get("a", str), "it has nothing"),
        ({"a": 1}, lambda item: item.get("a", str), "'a' is 1, must be text"),
        ({"a": " "}, lambda item: item.text("a"), "'a' is empty"),
        ({"a": ["x"]}, lambda item: item.texts("a", at_least=2), "'a' holds 1, an item needs at least 2"),
        ({"a": ["x", ""]}, lambda item: item.texts("a", at_least=2), r"'a'\[1\] is \"\", must be text"),
        ({"a": ["x", 3]}, lambda item: item.texts("a", at_least=2), r"'a'\[1\] is 3, must be text"),
        ({"a": "xy"}, lambda item: item.texts("a", at_least=2), "'a' is \"xy\", must be a list"),
        ({"a": 4}, lambda item: item.label("a", 4), "'a' is 4, must be 0 to 3, as there are 4"),
        ({"a": -1}, lambda item: item.label("a", 4), "'a' is -1, must be 0 to 3"),
        ({"a": True}, lambda item: item.label("a", 4), "'a' is true, must be a whole number"),
        ({"a": "b"}, lambda item: item.label("a", 4), "'a' is \"b\", must be a whole number"),
        ({"a": 1.0}, lambda item: item.label("a", 4), "'a' is 1.0, must be a whole number"),
        ({}, lambda item: item.label("a", 4), "no 'a'"),
    ],
)
def test_a_malformed_item_is_told_what_is_wrong(row, ask, said):
    with pytest.raises(UserError, match=said):
        ask(Item("f, line 1", row))


def test_a_label_may_be_written_as_text():
    assert Item("f", {"a": "3"}).label("a", 4) == 3
