"""Long words of a training text are cut, counted, and leave everything else as it is."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from regpt.text import bpe
from regpt.text.bpe import MAX_WORD, LongWords, train_bpe

REPEATED = st.sampled_from(["a", " ", "7", "!", "é", "_", "ab", "a1", " !"])
PART = st.one_of(
    st.text(st.sampled_from("ab1 '!\né日"), max_size=12),
    st.builds(lambda text, n: text * n, REPEATED, st.integers(1, 40)),
)


@example(" " * 21 + "1")  # the last space belongs to the next word
@given(st.lists(PART, max_size=12).map("".join))
@settings(deadline=None, max_examples=300)
def test_exactly_the_long_words_are_cut(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "MAX_WORD", 10)
        patch.setattr(bpe, "BLOCK", 5)
        found = LongWords()
        pieces = list(found.cut([text]))
        split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        lengths = [end - start for _, (start, end) in split]
    long = [length for length in lengths if length > 10 + 1]  # one more may be the space before a word
    assert "".join(pieces) == text
    assert len(long) <= found.count <= sum(length > 10 for length in lengths)
    assert len(pieces) <= 1 + sum(-(-length // 10) - 1 for length in lengths)
    if long:
        assert found.longest >= max(long) - 1


def test_text_without_long_words_passes_as_it_is():
    texts = ["the cat " * 2000, "x" * MAX_WORD, "日本、" * 3000, "", "\n" * MAX_WORD]
    found = LongWords()
    assert list(found.cut(texts)) == texts
    assert (found.count, found.longest) == (0, 0)


@pytest.mark.parametrize("word", ["ACGT" * 50_000, "a" * 200_000, "日" * 200_000, "=" * 200_000, " " * 200_000])
def test_a_long_word_becomes_pieces_of_the_longest_that_is_learned_from(word):
    found = LongWords()
    pieces = list(found.cut([f"the cat {word} the dog"]))
    assert len(pieces) in (200, 201)  # signs and white space take the space before them
    assert max(map(len, pieces)) <= MAX_WORD + len("the cat ")
    assert found.count == 1
    assert abs(found.longest - 200_000) <= 2


def test_the_words_around_a_long_one_are_learned():
    text, found = "the cat and the dog\n" * 40, LongWords()
    tokenizer = train_bpe([text + "x" * 5000 + "\n", text], 280, found)
    assert len(tokenizer.encode(" the")) == 1
    assert found.count == 1
