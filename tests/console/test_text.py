"""What a terminal is shown: names as they are, nothing that it would obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.console.text import LONGEST_MESSAGE, UNSAFE, counted, message, shortened, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("a\r\x08\x0b\x0c\x7f", r"a\x0d\x08\x0b\x0c\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("name\udcff", r"name\udcff"),
        ("line\n\ttab [bold]日本🙂 :smile: {x} é", "line\n\ttab [bold]日本🙂 :smile: {x} é"),
    ],
)
def test_control_characters_are_escaped_and_nothing_else(text: str, shown: str):
    assert visible(text) == shown


@given(st.text(st.characters()))
def test_visible_text_holds_nothing_unsafe_and_stays_visible(text: str):
    assert not UNSAFE.search(visible(text))
    assert visible(visible(text)) == visible(text)


def test_a_long_quotation_is_shortened_and_the_advice_after_it_stays():
    said = message(f"column {'n' * 10**6!r} is not in 'a.parquet'; it has \"{'m' * 5000}\"; give --text-column NAME")
    assert len(said) < 600
    assert said.startswith("column 'nnn")
    assert "nnn' is not in 'a.parquet'; it has \"mmm" in said
    assert said.endswith("give --text-column NAME")


def test_a_sentence_of_many_names_is_shortened_in_its_middle():
    said = message(f"the columns are {', '.join(f'c{i}' for i in range(100_000))}; give --text-column NAME")
    assert len(said) <= LONGEST_MESSAGE
    assert said.startswith("the columns are c0, c1")
    assert said.endswith("give --text-column NAME")


@pytest.mark.parametrize(("n", "shown"), [(7, "abcdefg"), (8, "abcdefgh"), (9, "abcde…hi")])
def test_what_is_longer_is_shortened_to_the_length(n: int, shown: str):
    assert shortened("abcdefghi"[:n], 8) == shown


def test_apostrophes_enclose_no_quotation():
    sentence = f"the run's folder {'and so on ' * 30} the model's weights"
    assert message(sentence) == sentence


def test_one_of_a_kind_is_in_the_singular():
    assert [counted(n, "document") for n in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]
    assert counted(2, "process", "processes") == "2 processes"
