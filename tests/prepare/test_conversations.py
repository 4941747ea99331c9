"""Files of conversations: five formats recognised by their columns, and what is wrong with a row."""

import json

import pytest

from regpt.errors import UserError
from regpt.prepare.conversations import ConversationReader

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
ROWS = {
    "instruction, input, output": [
        ({"instruction": "a?", "output": "b"}, [USER, ANSWER]),
        ({"instruction": "a?", "input": " ", "output": "b"}, [USER, ANSWER]),
        ({"instruction": "a", "input": "1", "output": "b"}, [{"role": "user", "content": "a\n\n1"}, ANSWER]),
        ({"instruction": "a?", "input": "", "output": "b", "system": "s"}, [SYSTEM, USER, ANSWER]),
    ],
    "messages": [
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),  # nothing is learned from a question at the end
        ({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}, [USER, ANSWER | {"weight": 0}, USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]}, ANSWER]}, [USER, ANSWER]),
    ],
    "ShareGPT conversations": [
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, [USER, ANSWER]),
        ({"system": "s", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
         [SYSTEM, USER, ANSWER]),
    ],
    "prompt and completion": [
        ({"prompt": "a?", "completion": "b"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ],
    "preference pairs": [
        ({"prompt": "a?", "chosen": "b", "rejected": "c"}, [USER, ANSWER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "c"}]}, [USER, ANSWER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "c"}]}, [USER, ANSWER]),
        ({"prompt": "\n\nHuman: a?\n\nAssistant:", "chosen": "b", "rejected": "c"}, [USER, ANSWER]),
        ({"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"}, [USER, ANSWER]),
    ],
}  # fmt: skip
BAD = [
    ({"messages": [ANSWER]}, "message 0 is an answer after nothing, must follow a user"),
    ({"messages": [USER, USER, ANSWER]}, "messages 0 and 1 are both of the user; join them"),
    ({"messages": [USER, SYSTEM, ANSWER]}, "message 1 has the role system, which can only be the first"),
    ({"messages": [USER, ANSWER, ANSWER]}, "message 2 is an answer after assistant"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "message 1 is of a tool after user"),
    ({"messages": [USER]}, "there is nothing to learn"),
    ({"messages": [USER, ANSWER | {"content": " "}]}, "there is nothing to learn"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "there is nothing to learn"),
    ({"messages": [USER, {"role": "robot", "content": "b"}]}, r"messages\[1\] has the role 'robot', must be one of"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] has no text as its content"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, r"messages\[1\] has tool_calls"),
    ({"messages": []}, "messages is empty, must be a list of messages"),
    ({"messages": [USER, ANSWER | {"content": "\ue000"}]}, r"message 1 has U\+E000"),
    ({"messages": [USER, ANSWER | {"content": "\ud800"}]}, "message 1 has a lone surrogate"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    ({"chosen": "b", "rejected": "c"}, "chosen is one text, so a prompt is needed"),
    ({"instruction": "a", "output": 3}, "output is not text but int"),
    ({"instruction": "a", "output": None}, "output is missing"),
    ({"text": "a"}, "no conversation is in the columns text; known are"),
    ([1], "not an object with columns"),
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_recognised_and_becomes_messages(tmp_path, name):
    for k, (row, messages) in enumerate(ROWS[name]):
        reader = ConversationReader([write(tmp_path / f"{k}.jsonl", [row])])
        (found,) = reader
        assert (found.messages, [*reader.formats.values()]) == (messages, [name])
        assert (found.rejected is not None) == (name == "preference pairs")
        if found.rejected is not None:
            assert found.rejected == [*messages[:-1], {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_refused_with_its_number_and_reason(tmp_path, row, said):
    good = {key: value for rows in ROWS.values() for one, _ in rows for key, value in one.items()
            if isinstance(row, dict) and set(one) == set(row)}  # fmt: skip
    rows = [good, row] if good else [row]
    with pytest.raises(UserError, match=f"line {len(rows)}: {said}"):
        list(ConversationReader([write(tmp_path / "x.jsonl", rows)]))


def test_bad_rows_are_skipped_and_counted(tmp_path):
    good = ROWS["messages"][0][0]
    path = write(tmp_path / "x.jsonl", [good, {"messages": [USER]}, {"other": 1}, good])
    path.write_text(path.read_text() + "\n{broken\n")
    reader = ConversationReader([path], skip=True)
    assert len(list(reader)) == reader.read == 2
    assert reader.skipped == 3
    assert "line 2: there is nothing to learn" in reader.reasons[0]


def test_tables_and_arrays_are_read_like_lines(tmp_path):
    rows = [{"instruction": "a?", "output": "b"}] * 2
    (tmp_path / "a.csv").write_text('instruction,output\na?,b\n"a?",b\n')
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ANSWER]}] * 2), tmp_path / "a.parquet")
    for name in ("a.csv", "a.json", "a.parquet"):
        assert [one.messages for one in ConversationReader([tmp_path / name])] == [[USER, ANSWER]] * 2


def test_the_place_of_a_row_is_looked_up_for_messages_alone(tmp_path, monkeypatch):
    """It costs a pass over the file: of a long one, as often as it has rows, that took minutes."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "q", "output": "a"}\n' * 3, encoding="utf-8")
    places = []
    monkeypatch.setattr("regpt.prepare.readers.place_of", lambda path, at: places.append(at) or f"byte {at}")
    found = list(ConversationReader([path]))
    assert len(found) == 3
    assert len(places) <= 1  # of the first row, whose format is recognised
    assert found[2].where() == "byte 72"
