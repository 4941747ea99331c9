"""JSON and TOML from elsewhere cost bounded time and memory, and what is wrong with them is one short sentence."""

import json
import tomllib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt import structured
from regpt.errors import UserError
from regpt.structured import MAX_DEPTH, json_lines, parse_json, parse_toml, read_json

DIGITS = "9" * 5000
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
JSON_BOMBS = {
    "brackets": "[" * 200_000,
    "brackets that end": "[" * 200_000 + "]" * 200_000,
    "objects": '{"a":' * 200_000,
    "just too deep": "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "digits": DIGITS,
    "digits inside": f'{{"a":[{DIGITS}]}}',
    "as many digits as Python reads": "9" * 4000,
    "many empty lists": "[" + "[]," * 3_000_000 + "1]",
    "not UTF-8": b"\xff\xfe{}",
    "UTF-16": "{}".encode("utf-16"),
    "nothing": "",
    "half": '{"a":',
}
TOML_BOMBS = {
    "brackets": "a=" + "[" * 100_000 + "]" * 100_000,
    "brackets that do not end": "a=" + "[" * 100_000,
    "tables": "a=" + "{a=" * 100_000,
    "digits": f"a={DIGITS}",
    "hexadecimal": "a=0x" + "f" * 5000,
    "octal": "a=0o" + "7" * 9000,
    "binary": "a=0b" + "1" * 30_000,
    "dots": ".".join("a" * 50_000) + "=1",
    "dots in a header": "[" + ".".join("a" * 50_000) + "]",
    "dots between quotes": ".".join(['"a"'] * 50_000) + "=1",
    "dots in a table": "x={" + " . ".join("a" * 50_000) + "=1}",
    "many lines of dots": "\n".join(".".join("a" * 200) + f".b{i}=1" for i in range(2000)),
    "quotes": "a='" + '"\\' * 200_000,
    "too long": "#" * (2 << 20),
    "not UTF-8": b"a='\xff'",
    "an impossible date": "a=2026-13-45",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_json_beyond_the_limits_is_a_short_value_error(bomb):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_json(bomb)
    assert len(str(caught.value)) < 200
    assert "sys." not in str(caught.value)


@pytest.mark.parametrize("bomb", TOML_BOMBS.values(), ids=TOML_BOMBS)
def test_toml_beyond_the_limits_is_a_short_value_error(bomb):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_toml(bomb)
    assert len(str(caught.value)) < 200
    assert "sys." not in str(caught.value)


def test_a_byte_order_mark_in_front_is_no_part_of_the_text():
    assert parse_json("\ufeff[1]") == parse_json("\ufeff[1]".encode()) == [1]
    assert parse_toml("\ufeffa = 1\r\n") == parse_toml("\ufeffa = 1\r\n".encode()) == {"a": 1}


@given(VALUES)
def test_json_within_the_limits_is_what_python_reads(value):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def test_depth_and_digits_are_read_up_to_their_limits():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("9" * 40) == 10**40 - 1
    assert parse_toml(".".join("a" * 90) + "=1")


@pytest.mark.parametrize(
    "text", ["# " + "." * 5000, "a = '" + "..." * 500 + "'", 'a = "' + "One. " * 500 + '"', "a = ['''x\n...''', '.']"]
)
def test_dots_in_texts_and_comments_are_no_keys(text):
    assert parse_toml(text) == tomllib.loads(text)


def test_a_line_of_any_length_is_read_with_the_memory_of_the_longest_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(structured, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"a":"' + b"x" * 10_000_000 + b'"}\n{"a":2}\n{"a":3')
    tracemalloc.start()
    assert list(json_lines(path)) == [
        (1, {"a": 1}, True),
        (3, None, True),
        (4, {"a": 2}, True),
        (5, None, False),
    ]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["no.json", "folder", "a\0b", "a" * 5000])
def test_a_file_that_is_none_is_one_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*; restore it"):
        read_json(tmp_path / name, "restore it")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"a\.json' has more than 64 MiB, too much for its kind; restore it"):
        read_json(tmp_path / "a.json", "restore it")
