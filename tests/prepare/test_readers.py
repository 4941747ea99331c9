"""What people have: tables, arrays, other encodings, separators, templates, source code; and what is wrong in them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt import compression
from regpt.errors import UsageError, UserError
from regpt.prepare import json_rows, parquet
from regpt.prepare.decontaminate import read_items
from regpt.prepare.json_rows import records
from regpt.prepare.named import list_sources
from regpt.prepare.readers import check_text, parts_of, read_documents, split_at
from regpt.prepare.settings import TextOptions
from regpt.prepare.sources import find_files, text_files
from regpt.remote.download import RemoteOptions

TEXTS = ["one", 'two, "quoted"\nand a line', "  日本語 🙂 ", "x" * 5000]


def texts_of(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents(path, TextOptions(**options)) if not document.error]


def errors_of(path: Path, **options) -> list[str | None]:
    """The reason of each document, None for a good one."""
    documents = read_documents(path, TextOptions(on_error="skip", **options))
    return [document.error.reason if document.error else None for document in documents]


def table(rows: list[list[str]], **options) -> str:
    out = io.StringIO()
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t"), ("d.CSV", "|")])
def test_a_table_has_one_document_a_row(tmp_path, name, delimiter):
    rows = [["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS)), []]
    (tmp_path / name).write_text(table(rows, delimiter=delimiter), encoding="utf-8-sig", newline="")
    assert texts_of(tmp_path / name) == TEXTS
    assert texts_of(tmp_path / name, template="{id}: {text}")[0] == "0: one"


@pytest.mark.parametrize(
    ("content", "reasons", "said"),
    [
        ("id,text\n1,a\n2\n3,c\n", [None, "ragged", None], "line 3: 1 fields, but the first row has 2"),
        ("id,text\n1,a,b\n2,c\n", ["ragged", None], "line 2: 3 fields, but the first row has 2"),
        ('id,text\n1,"a"b\n2,c\n', ["ragged", None], "line 2: not a row of a table"),
        ('id,text\n1,a\n2,"b\n3,c\n', [None, "ragged"], "line 3: not a row of a table .*; quotes must be"),
        (b"id,text\n1,a\n2,\xff\n3,c\n", [None, "not_utf8", None], "line 3: byte 0xff is not valid UTF-8"),
        ("id,text\n1,a\0b\n", [None], None),
        ("\n\nid,text\n\n1,a\n", [None], None),
        ("", [], None),
    ],
)
def test_a_bad_row_of_a_table_is_named_or_skipped(tmp_path, content, reasons, said):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert errors_of(path) == reasons
    if said:
        with pytest.raises(UserError, match=rf"a\.csv, {said}"):
            texts_of(path)


def test_a_wrong_column_is_named_with_its_neighbours_whatever_is_skipped(tmp_path):
    (tmp_path / "a.csv").write_text("id,txet\n1,a\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,text\n1,a\n", encoding="utf-8")
    (tmp_path / "c.csv").write_bytes("id,text\n1,a\n".encode("utf-16-le"))
    for name, said in (
        ("a", r"line 1: no column 'text' \(did you mean 'txet'\?\), there are id, txet; name it with --text-column"),
        ("b", "has more than one column 'text'"),
        ("c", "is not text: it holds zero bytes, as UTF-16 does; .* name its --encoding"),
    ):
        with pytest.raises(UserError, match=said):
            texts_of(tmp_path / f"{name}.csv", on_error="skip")
    assert texts_of(tmp_path / "c.csv", encoding="utf-16-le") == ["a"]


@pytest.mark.parametrize("pretty", [None, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_json_files_hold_an_array_or_objects_in_a_row(tmp_path, pretty, inside):
    rows = [{"text": text, "more": [1, {"a": "]}, {\\"}]} for text in TEXTS]
    content = json.dumps(rows, indent=pretty) if inside else "\n".join(json.dumps(row, indent=pretty) for row in rows)
    (tmp_path / "a.json").write_text(f"\ufeff\n {content}\n", encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.json", "a.json.gz"):
        assert texts_of(tmp_path / name) == TEXTS
        assert texts_of(tmp_path / name, text_column="more.1.a") == ["]}, {\\"] * 4


@given(
    values=st.lists(
        st.recursive(
            st.text('ab\\"[]{},: \n', max_size=6) | st.integers(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text('a\\"', max_size=2), inner),
        )
    ),
    size=st.integers(1, 9),
)
def test_records_are_the_elements_wherever_blocks_end(values, size):
    data = json.dumps(values, indent=1).encode()
    blocks = iter([data[i : i + size] for i in range(0, len(data), size)])
    assert [json.loads(record) for record in records(blocks, Path("a.json"))] == values


@pytest.mark.parametrize(
    ("content", "reasons", "said"),
    [
        (
            '[{"text": "a"}, {oops}, {"text": "b"}]',
            [None, "not_json", None],
            r"record 2: not JSON .*; a \.json file has",
        ),
        ('[{"text": "a"}, {"te', [None, "damaged"], "is damaged: it ends inside its last record"),
        ('[{"text": "a"}, {"text": "b', [None, "damaged"], "is damaged: it ends inside its last record"),
        ('{"text": "a"}\n{"text": ', [None, "damaged"], "is damaged: it ends inside its last record"),
        ('[{"text": "a"}] [', [None, "not_json"], "goes on after its array"),
        (
            '[{"text": 1}, {"body": "a"}, ["a"], "b"]',
            ["not_text", "no_column", "no_column", None],
            "column 'text' is not",
        ),
        ('"text"', ["not_json"], "begins with b'\"'; a .json file has one array"),
        ("", ["not_json"], "is empty; a .json file has one array"),
        ("[]", [], None),
        ("[" * 100_000, ["damaged"], "is damaged"),
        ("[" * 50_000 + "]" * 50_000, ["not_json"], "record 1: not JSON"),
    ],
)
def test_a_bad_json_file_is_one_sentence_or_skipped_from_there(tmp_path, content, reasons, said):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert errors_of(tmp_path / "a.json") == reasons
    if said:
        with pytest.raises(UserError, match=rf"a\.json.*{said}"):
            texts_of(tmp_path / "a.json")


def test_a_row_is_of_bounded_length(tmp_path, monkeypatch):
    for module in (compression, json_rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "BLOCK", 100)
    row = json.dumps({"text": "x" * 2000})
    for name, content, place in (
        ("a.jsonl", f"\n{row}\n", "line 2"),
        ("a.jsonl.gz", f"\n{row}\n", "line 2"),
        ("a.json", f'["a", {row}]', "record 2"),
        ("a.csv", f"text\na\n{'x' * 2000}\n", "line 3"),
        ("b.csv", 'text\na\n"' + "x\n" * 1000, "line 3"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
        with pytest.raises(UserError, match=rf"{name}, {place}: "):
            texts_of(tmp_path / name)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_every_kind_of_text_may_be_compressed(tmp_path, pack):
    ending = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[pack.__module__]
    for name, content in (
        ("a.txt", "one"),
        ("a.csv", "text\none\n"),
        ("a.jsonl", '{"text": "one"}'),
        ("a.json", '["one"]'),
    ):
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(pack(content.encode()))
        assert texts_of(path) == ["one"]
        path.write_bytes(pack(content.encode() * 100)[:-9])
        with pytest.raises(UserError, match=rf"{name}\.{ending} is damaged: it does not decompress"):
            texts_of(path)
        assert errors_of(path)[-1] == "damaged"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_left_out(tmp_path, encoding):
    text = "日本\r\n" * 3000
    contents = {
        "a.txt": text,
        "a.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
        "a.csv": table([["text"], [text]]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert texts_of(tmp_path / name) == [text]
        parts = parts_of(tmp_path / name, 5000)
        assert [found.text for part in parts for found in read_documents(tmp_path / name, part=part)] == [text]
        (source,) = find_files(str(tmp_path / name))
        assert source.record()["byte_order_mark"] == 1


def test_another_encoding_is_named(tmp_path):
    for name, content in (("a.txt", "grün"), ("a.jsonl", '{"text": "grün"}\n'), ("a.json", '["grün"]')):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        assert texts_of(tmp_path / name, encoding="latin-1") == ["grün"]
        with pytest.raises(UserError, match=r"byte 0xfc is not valid UTF-8; .* name its --encoding"):
            texts_of(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"a" * 300_000 + b"\x81")
    with pytest.raises(UserError, match=r"b\.txt is not text in the encoding cp1252"):
        texts_of(tmp_path / "b.txt", encoding="cp1252")


def test_a_separator_cuts_texts_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("<|e|>\none\n<|e|>\r\ntwo\n\nlines\n<|e|><|e|>\nthree", encoding="utf-8")
    assert texts_of(tmp_path / "a.txt", separator="<|e|>") == ["one", "two\n\nlines", "", "three"]
    (tmp_path / "a.jsonl").write_text('{"text": "one<|e|>two<|e|>"}\n{"text": "three"}', encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl", separator="<|e|>") == ["one", "two", "three"]


@given(text=st.text("ab|", max_size=60), separator=st.text("ab|", min_size=1, max_size=4), size=st.integers(1, 7))
def test_separators_are_found_wherever_blocks_end(text, separator, size):
    data = text.encode()
    found = list(split_at(iter([data[i : i + size] for i in range(0, len(data), size)]), separator.encode()))
    expected = text.encode().split(separator.encode())
    expected = expected[1:] if not expected[0] and len(expected) > 1 else expected
    assert found == (expected if expected[-1] else expected[:-1])


def test_columns_inside_others_are_named_by_their_path(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"doc": {"text": text, "n": i}, "title": "t"} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    for name in ("a.jsonl", "a.parquet"):
        assert texts_of(tmp_path / name, text_column="doc.text") == TEXTS
        assert texts_of(tmp_path / name, template="{title} {doc.n}: {doc.text}")[0] == "t 0: one"
        said = r"no column 'doc.txt' \(did you mean 'doc.text'\?\), there are doc.(n|text), doc.(n|text), title"
        with pytest.raises(UserError, match=said):
            texts_of(tmp_path / name, text_column="doc.txt")
        with pytest.raises(UserError, match="column 'doc' is not text but"):
            texts_of(tmp_path / name, text_column="doc")


def test_columns_inside_lists_and_keys_with_dots_are_named_by_their_path(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"chat": [{"role": "user", "content": text}, {"role": "x", "content": ""}], "m": {"a.b": [text]}} for text in TEXTS]  # fmt: skip  # noqa: E501
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    for name in ("a.jsonl", "a.parquet"):
        for column in ("chat.0.content", "m.a.b.0", "m.a.b.-1"):
            assert texts_of(tmp_path / name, text_column=column) == TEXTS
        template = "{chat.0.role}: {chat.0.content}{chat.1.content}{m.a.b.0}"
        assert texts_of(tmp_path / name, template=template)[0] == "user: oneone"
        with pytest.raises(UserError, match=r"did you mean 'chat.0.content'"):
            texts_of(tmp_path / name, text_column="chat.content")
        with pytest.raises(UserError, match=r"no column 'chat.2.content'"):
            texts_of(tmp_path / name, text_column="chat.2.content")


def test_a_column_of_nulls_is_empty_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["", "", ""]


def test_a_key_with_a_dot_and_an_empty_template(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "one", "c": null, "d": true}\n', encoding="utf-8")
    assert texts_of(tmp_path / "a.jsonl", text_column="a.b") == ["one"]
    assert texts_of(tmp_path / "a.jsonl", template="{{{a.b}}} {c}|{d}") == ["{one} |true"]
    assert texts_of(tmp_path / "a.jsonl", template="Title: {c}") == [""]


def test_one_bad_text_of_a_parquet_file_is_skipped(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    offsets = b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3))
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert errors_of(tmp_path / "a.parquet") == [None, "not_utf8", None]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert errors_of(tmp_path / "b.parquet") == ["damaged"]
    assert len(parts_of(tmp_path / "b.parquet", 100, TextOptions(on_error="skip"))) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "xlsx"}, "--format is 'xlsx', must be one of txt"),
        ({"format": "jsnl"}, r"--format is 'jsnl' \(did you mean 'jsonl'\?\)"),
        ({"encoding": "utf-9"}, "--encoding 'utf-9' is not known"),
        ({"encoding": "rot13"}, "--encoding 'rot13' is not known"),
        ({"separator": "\n"}, "--separator must be more than line ends"),
        ({"separator": ""}, "--separator must be more than line ends"),
        ({"template": "no column"}, "--template 'no column' names no column"),
        ({"template": "{a"}, r"--template '\{a' is not one"),
        ({"template": "{a!r}"}, "has more in braces than the names of columns"),
        ({"template": "{}{a}"}, "has more in braces than the names of columns"),
        ({"template": "{a}", "text_column": "b"}, "--text-column and --template both say"),
    ],
)
def test_wrong_options_are_one_sentence(options, said):
    with pytest.raises(UsageError, match=said):
        check_text(TextOptions(**options))


def test_tables_of_a_folder_are_read_where_there_is_nothing_better(tmp_path):
    for name in ("a.csv", "b.json.gz", "c.py"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert [file.file for file in find_files(str(tmp_path))] == ["a.csv", "b.json.gz"]
    (tmp_path / "d.jsonl").write_text("x", encoding="utf-8")
    assert [file.file for file in find_files(str(tmp_path))] == ["d.jsonl"]


def test_other_files_are_read_as_text_when_they_are_asked_for(tmp_path):
    for name in ("a.py", "b/c.py", "b/d.rs", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("print(1)", encoding="utf-8")
    wanted = text_files(TextOptions(include=("*.py", "b/*.rs")))
    assert [file.file for file in find_files(str(tmp_path), wanted=wanted)] == ["a.py", "b/c.py", "b/d.rs"]
    assert [file.file for file in find_files(str(tmp_path / "a.py"), wanted=wanted)] == [str(tmp_path / "a.py")]
    assert texts_of(tmp_path / "a.py") == ["print(1)"]
    everything = text_files(TextOptions(format="txt"))
    assert len(find_files(str(tmp_path), wanted=everything)) == 4
    with pytest.raises(UserError, match=r"a\.py' is of a kind that is not read; .*; other text files with --include"):
        find_files(str(tmp_path / "a.py"))


def test_evaluation_items_of_every_kind_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\none,two\n", encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"q": "one", "a": ["two"]}]', encoding="utf-8")
    for name in ("a.csv", "a.json"):
        assert list(read_items(tmp_path / name)) == [["one", "two"]]


class Pipe:
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer, self.isatty = io.BytesIO(content), lambda: terminal


def test_stdin_is_a_source_with_a_format(tmp_path, monkeypatch):
    options, text = RemoteOptions(cache=tmp_path), TextOptions(format="jsonl")
    monkeypatch.setattr(sys, "stdin", Pipe(b'{"text": "one"}\n'))
    with pytest.raises(UsageError, match=r"has no name that says what it is; add --format"):
        list_sources(["-"], options=options)
    kept = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", Pipe(b'{"text": "one"}\n'))
        kept.append(list_sources(["-"], options=options, text=text))
        assert [document.text for document in kept[-1].train[0].documents(text)] == ["one"]
    assert len(list((tmp_path / "stdin").iterdir())) == 1
    kept[-1].discard()
    assert not list((tmp_path / "stdin").iterdir())
    with pytest.raises(UsageError, match="is given twice"):
        list_sources(["-"], ["-"], options=options, text=text)
    monkeypatch.setattr(sys, "stdin", Pipe(b"", terminal=True))
    with pytest.raises(UsageError, match="is a terminal"):
        list_sources(["-"], options=options, text=text)


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("rows", [["c" * 1001], ["a" * 900, "b", None, "c" * 1001]])
def test_a_row_of_a_parquet_file_that_is_longer_than_is_read_is_named(tmp_path, monkeypatch, dictionary, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 1000)
    content, how = pa.table({"text": rows, "id": range(len(rows))}), {"write_statistics": False}
    pq.write_table(content, tmp_path / "a.parquet", use_dictionary=dictionary, **how)
    where = "row group 0" if len(rows) == 1 else f"row {len(rows) - 1}"  # by the footer, or when it is unpacked
    for options in ({}, {"template": "{id} {text}"}):
        with pytest.raises(UserError, match=rf"a\.parquet, {where}: more than .* in one row, the most that is read"):
            texts_of(tmp_path / "a.parquet", **options)
    pq.write_table(content.slice(0, len(rows) - 1), tmp_path / "b.parquet", **how)
    assert texts_of(tmp_path / "b.parquet") == [row or "" for row in rows[:-1]]
