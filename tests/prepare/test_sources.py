"""Files → documents: order, formats, and one sentence for whatever is wrong with a file."""

import gzip
import io
import json
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.compression import decompressed
from regpt.errors import UserError
from regpt.prepare.documents import FilePart
from regpt.prepare.readers import parts_of, read_documents
from regpt.prepare.settings import TextOptions
from regpt.prepare.sources import find_files

TEXTS = ["first\r\ntext", "zweiter Text: äöü\n", "日本 🙂"]


def texts_of(path: Path, column: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, TextOptions(column))]


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document_unchanged_but_for_its_mark(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("\ufeffone\r\ntwo\n".encode())
    assert texts_of(path) == ["one\r\ntwo\n"]


def test_a_jsonl_file_has_one_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": text, "id": 1} for text in TEXTS]) + b"\n  \n" + jsonl([{"text": None}]))
    assert texts_of(path) == [*TEXTS, ""]


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_compressed_jsonl_reads_as_if_it_were_not(tmp_path, packed):
    data = jsonl([{"body": text} for text in TEXTS])
    if packed == "zst":
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.ZstdCompressor().compress(data[:20]) + zstandard.ZstdCompressor().compress(data[20:])
    path = tmp_path / f"a.jsonl.{packed}"
    path.write_bytes(gzip.compress(data) if packed == "gz" else data)
    documents = list(read_documents(path, TextOptions("body")))
    assert [document.text for document in documents] == TEXTS
    assert sum(document.source_bytes for document in documents) == path.stat().st_size


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_a_parquet_file_has_one_document_a_row(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    kinds = {"large_string": pa.large_string(), "string_view": pa.string_view()}
    texts = TEXTS * 200  # more than a batch of rows
    column = pa.array(texts, kinds.get(kind, pa.string()))
    column = column.dictionary_encode() if kind == "dictionary" else column
    path = write_parquet(tmp_path / "a.parquet", {"id": range(600), "text": column}, row_group_size=70)
    documents = list(read_documents(path))
    assert [document.text for document in documents] == texts
    assert sum(document.source_bytes for document in documents) == pytest.approx(path.stat().st_size)


def test_a_folder_is_read_recursively_in_the_order_of_its_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.jsonl", "a.b.txt", "notes.pdf", "a/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = find_files(str(tmp_path))
    assert [file.file for file in found] == ["a/b/c.jsonl", "a/z.md", "a.b.txt", "b.txt"]
    assert {file.source for file in found} == {str(tmp_path)}


def test_a_glob_is_sorted_and_a_file_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.md"):
        Path(name).write_text("x", encoding="utf-8")
    assert [file.file for file in find_files("*.txt")] == ["a.txt", "b.txt"]
    assert [file.file for file in find_files("c.md")] == ["c.md"]


def test_a_record_has_size_and_hash_and_the_name_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(b"abc")
    (record,) = [file.record() for file in find_files("a.txt")]
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of abc, FIPS 180-2
    assert record == {"source": "a.txt", "file": "a.txt", "bytes": 3, "sha256": abc}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"one\ntwo \xff", r"a\.txt, line 2: byte 0xff is not valid UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', r"a\.jsonl, line 2: byte 0xe4 is not valid UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{oops}\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'["x"]\n', r"line 1: not a JSON object"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"line 1: no column 'text', there are body, id; name it with --text-c",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: column 'text' is not text but int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: the text has a lone surrogate"),
        ("a.jsonl.gz", b"nothing packed", r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.gz", gzip.compress(jsonl([{"text": "x" * 500}]), mtime=0)[:-12], r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.zst", b"nothing packed", r"a\.jsonl\.zst is damaged"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz is damaged: it does not decompress \(it is empty\)"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst is damaged: it does not decompress \(it is empty\)"),
        ("a.parquet", b"nothing of the kind", r"a\.parquet is damaged or not a parquet file"),
        ("a.parquet", b"", r"a\.parquet is damaged or not a parquet file"),
        (
            "a.txt",
            b"\x7fELF\x02\x01\x01\0\0\0",
            r"a\.txt is not text: it holds zero bytes, as binary files and UTF-16 do",
        ),
        ("a.md", "text".encode("utf-16-le"), r"a\.md is not text: it holds zero bytes"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_bad_file_is_one_sentence_with_file_and_line(tmp_path, name, content, said):
    if name.endswith(("zst", "parquet")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        texts_of(tmp_path / name)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_truncated_file_is_damaged(tmp_path, name, share):
    texts = [f"{random.Random(i).random()} text" for i in range(2000)]
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {"text": texts})
    else:
        data = jsonl([{"text": text} for text in texts])
        packed = gzip.compress(data) if name.endswith("gz") else pytest.importorskip("zstandard").compress(data)
        (tmp_path / name).write_bytes(packed)
    assert texts_of(tmp_path / name) == texts
    with pytest.raises(UserError, match=f"{name} is damaged"):
        texts_of(cut(tmp_path / name, share))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}],
    ids=["dictionary", "delta"],
)
@pytest.mark.parametrize("text", [{}, {"template": "{text}{id}"}, {"text_column": "doc.text"}], ids=str)
def test_rows_that_share_a_text_are_in_memory_some_at_a_time(tmp_path, options, text):
    pa = pytest.importorskip("pyarrow")
    texts = ["a b " * 2**16] * 600
    columns = {"text": texts, "id": ["x"] * 600}
    if "text_column" in text:
        columns = {"doc": [{"text": one} for one in texts]}
        options = options | {"column_encoding": {"doc.text": "DELTA_BYTE_ARRAY"}} if options else options
    path = write_parquet(tmp_path / "a.parquet", columns, compression="zstd", **options)
    assert path.stat().st_size < 2**19
    before = pa.total_allocated_bytes()
    for number, document in enumerate(read_documents(path, TextOptions(**text))):
        assert len(document.text.rstrip("x")) == 2**18
        if number % 50 == 0:
            assert pa.total_allocated_bytes() - before < 2**25  # all rows together are 150 MiB
    assert number == 599


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_beyond_the_limit_is_named_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("regpt.compression.MAX_ROW_BYTES", 1 << 20)
    data = jsonl([{"text": "a"}, {"text": "b" * 2**27}])
    if name.endswith("gz"):
        data = gzip.compress(data)
    if name.endswith("zst"):
        data = pytest.importorskip("zstandard").compress(data)
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=rf"{name}, line 2: more than 1 MiB in one row, the most that is read; divide it"
    ):
        texts_of(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_zstandard_blocks_that_repeat_one_byte_are_unpacked_some_at_a_time(tmp_path):
    pytest.importorskip("pyarrow")
    blocks = [(2 | last | 2**17 << 3).to_bytes(3, "little") + b"\n" for last in [0] * 4000 + [1]]  # RFC 8878, 3.1.1.2
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(blocks))
    tracemalloc.start()
    with (tmp_path / "a.jsonl.zst").open("rb") as raw, decompressed(raw, tmp_path / "a.jsonl.zst", ".zst") as stream:
        assert all(stream.read(1 << 20) for _ in range(100))
    assert tracemalloc.get_traced_memory()[1] < 2**27  # 16 kB are 500 MB
    tracemalloc.stop()


def test_a_parquet_file_with_damaged_pages_is_damaged(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"document {i}" for i in range(2000)]})
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\xff" * 1900  # the footer stays whole
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet"):
        texts_of(path)


def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"):
        with pytest.raises(UserError, match=r"cannot be read \(No such file"):
            texts_of(tmp_path / name)


@given(
    lines=st.lists(st.sampled_from(["", " ", "{}", "short", "a much longer text", "äöü🙂"]), max_size=20),
    target=st.integers(1, 60),
    end=st.booleans(),
)
def test_parts_of_lines_are_together_the_file(tmp_path_factory, lines, target, end):
    """Wherever the borders fall: in a line, at its end, in a character."""
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    data = b"\n".join(line.encode() if not line.strip() else json.dumps({"text": line}).encode() for line in lines)
    path.write_bytes(data + b"\n" * end)
    parts = parts_of(path, target)
    assert sum(part.bytes for part in parts) == path.stat().st_size
    found = [document for part in parts for document in read_documents(path, part=part)]
    assert [document.text for document in found] == [line for line in lines if line.strip()]


def test_parts_of_parquet_are_row_groups(tmp_path):
    texts = [f"document {i} " * (i % 50) for i in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", {"id": range(1000), "text": texts}, row_group_size=90)
    size = path.stat().st_size
    for target, expected in ((1, 12), (size // 4, 4), (10 * size, 1)):
        parts = parts_of(path, target)
        assert len(parts) == expected
        assert (parts[0].start, parts[-1].stop, sum(part.bytes for part in parts)) == (0, 12, size)
        found = [document for part in parts for document in read_documents(path, part=part)]
        assert [document.text for document in found] == texts
        assert sum(document.source_bytes for document in found) == pytest.approx(size)


def test_parts_of_what_cannot_be_divided_are_one(tmp_path):
    for name, data in (("a.txt", b"text"), ("a.jsonl.gz", gzip.compress(jsonl([{"text": "x"}])))):
        (tmp_path / name).write_bytes(data)
        assert parts_of(tmp_path / name, 1) == [FilePart(0, 1, len(data))]
        assert len(list(read_documents(tmp_path / name, part=FilePart(0, 1, len(data))))) == 1
    empty = write_parquet(tmp_path / "a.parquet", {"text": []})
    (part,) = parts_of(empty, 1)
    assert part.bytes == empty.stat().st_size


def test_a_part_names_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "x" * 50}] * 30) + b"{oops}\n")
    parts = parts_of(path, 300)
    assert len(parts) > 5
    with pytest.raises(UserError, match=r"a\.jsonl, line 31: not JSON"):
        list(read_documents(path, part=parts[-1]))


def test_every_format_gives_what_a_direct_read_gives(tmp_path):
    pq, zstandard = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("zstandard")
    alphabet = 'abc äöü 日本 🙂 \n\r\t\\"\u2028 \x00'
    texts = ["".join(random.Random(i).choices(alphabet, k=i % 300)) for i in range(700)]
    for row_group_size in (1, 100, 10_000):
        path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=row_group_size)
        assert texts_of(path) == pq.read_table(path)["text"].to_pylist() == texts
    data = jsonl([{"text": text} for text in texts])
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert texts_of(path) == [json.loads(line)["text"] for line in path.read_bytes().splitlines()] == texts
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    direct = gzip.decompress(path.read_bytes())
    assert texts_of(path) == [json.loads(line)["text"] for line in direct.splitlines()] == texts
    path = tmp_path / "a.jsonl.zst"
    skipped = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"skip"  # RFC 8878, 3.1.2
    path.write_bytes(
        zstandard.compress(data[:5000]) + skipped + zstandard.compress(data[5000:]) + zstandard.compress(b"")
    )
    direct = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes()), read_across_frames=True).read()
    assert texts_of(path) == [json.loads(line)["text"] for line in direct.splitlines()] == texts


@pytest.mark.parametrize("values", [[["a", "b"]], [{"x": "a"}]])
def test_a_nested_parquet_column_is_refused(tmp_path, values):
    path = write_parquet(tmp_path / "a.parquet", {"text": values})
    with pytest.raises(UserError, match=r"column 'text' is not text but (list|struct)<.*>; name another with --text-c"):
        texts_of(path)


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="has more than one column 'text', there are text, text"):
        texts_of(tmp_path / "a.parquet")


def test_a_parquet_column_must_exist_and_be_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]})
    with pytest.raises(UserError, match="no column 'text', there are id, body; name it with --text-column"):
        texts_of(path)
    with pytest.raises(UserError, match="column 'id' is not text but int64"):
        texts_of(path, "id")


def test_a_parquet_text_that_is_not_utf8_names_the_file_and_the_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    offsets, content = b"\0\0\0\0\1\0\0\0\2\0\0\0", b"a\xff"
    column = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(content)])
    path = write_parquet(tmp_path / "a.parquet", {"text": column}, row_group_size=1)
    for read in (lambda: texts_of(path), lambda: list(read_documents(path, part=parts_of(path, 1)[1]))):
        with pytest.raises(UserError, match=r"a\.parquet, row 1: the text is not valid UTF-8"):
            read()


def test_nothing_found_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        find_files(str(tmp_path / "*.txt"))
    with pytest.raises(UserError, match=r"holds no readable file; allowed are \.txt"):
        find_files(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"of a kind that is not read; allowed are \.txt"):
        find_files(str(tmp_path / "a.pdf"))
    with pytest.raises(UserError, match=r"'pydoc' \(did you mean 'pydocs'\?\)"):
        find_files("pydoc")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "pyarrow")])
def test_a_missing_optional_package_names_the_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"needs {package}; install it with: pip install 'regpt\[data\]'"):
        texts_of(tmp_path / name)
