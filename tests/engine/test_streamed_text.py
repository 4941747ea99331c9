"""Streaming: pieces are whole characters, together they are the text, and no stop string is ever shown."""

from codecs import getincrementaldecoder

from hypothesis import given, settings
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


class Pieces:
    """A tokenizer whose tokens are these bytes."""

    eot, stop_ids = -1, ()

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")


STOPS = st.lists(st.text(alphabet="ab\ufffd中🎭", min_size=1, max_size=4), max_size=4)
ANY_BYTES = st.binary(max_size=5) | st.text(alphabet="ab\ufffd中🎭", max_size=4).map(str.encode)
CUT_BYTES = st.sampled_from(["中".encode()[:1], "中".encode()[1:], "🎭".encode()[:2], "🎭".encode()[2:], b"a", b"b"])


def cut(text: str, stop: list[str]) -> str:
    """`text` up to the stop string that is the first to be complete."""
    ends = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=400)
@given(st.lists(CUT_BYTES | ANY_BYTES, max_size=12), STOPS)
def test_streamed_text_is_the_whole_text_cut_at_its_first_stop_string(tokens, stop):
    """Whatever the tokens are: parts of characters, several characters, invalid bytes, stop strings across them; and
    what waits is what may become a stop string, nothing more."""
    stream, shown, read = TextStream(Pieces(tokens), stop=stop), "", b""
    whole = cut(b"".join(tokens).decode("utf-8", "replace"), stop)
    for number, token in enumerate(tokens):
        shown, read = shown + stream.push(number), read + token
        known = getincrementaldecoder("utf-8")("replace").decode(read)  # without a part of a character at the end
        assert whole.startswith(shown)
        assert stream.stopped == any(one in known for one in stop)
        if not stream.stopped:
            possible = [
                n for n in range(len(known) + 1) if any(one.startswith(known[len(known) - n :]) for one in stop)
            ]
            assert shown == known[: len(known) - max(possible, default=0)]
    assert shown + stream.finish() == whole


def test_only_what_may_become_a_stop_string_waits():
    stream = TextStream(BYTES, [97], ["abc", "x"])
    assert [stream.push(token) for token in BYTES.encode("zabab")] == ["z", "", "", "ab", ""]
    assert stream.finish() == "ab"


def test_a_character_that_the_prompt_begins_is_completed():
    first, *rest = BYTES.encode("é")
    stream = TextStream(BYTES, [97, first])
    assert [stream.push(token) for token in rest] == ["é"]
