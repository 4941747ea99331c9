"""Streaming: pieces are whole characters, together they are the text, and no stop string is ever shown."""

from hypothesis import given
from hypothesis import strategies as st

from regpt.engine.text import TextStream, text_pieces
from regpt.text.open import open_tokenizer

BYTES = open_tokenizer("bytes")
TEXTS = st.text(alphabet="ab \ufffdé中🎭", max_size=30)


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(0, 40))
def test_pieces_of_any_bytes_are_the_decoded_text(tokens, cut):
    prompt, new = tokens[:cut], tokens[cut:]
    assert "".join(text_pieces(BYTES, prompt, new)) == BYTES.decode(tokens)


@given(TEXTS)
def test_a_piece_is_whole_characters_as_soon_as_they_are_complete(text):
    stream, shown = TextStream(BYTES, [97]), ""
    for character in text:
        *first, last = BYTES.encode(character)
        assert [stream.push(token) for token in first] == [""] * len(first)
        assert stream.push(last) == character
        shown += character
    assert stream.finish() == ""


@given(TEXTS, st.lists(st.text(alphabet="ab 中", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    stream = TextStream(BYTES, [97], stop)
    pieces = []
    for token in BYTES.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [text.index(one) for one in stop if one in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)


def test_only_what_may_become_a_stop_string_waits():
    stream = TextStream(BYTES, [97], ["abc", "x"])
    assert [stream.push(token) for token in BYTES.encode("zabab")] == ["z", "", "", "ab", ""]
    assert stream.finish() == "ab"


def test_a_character_that_the_prompt_begins_is_completed():
    first, *rest = BYTES.encode("é")
    stream = TextStream(BYTES, [97, first])
    assert [stream.push(token) for token in rest] == ["é"]
