"""What a terminal is shown: names as they are, nothing that it would obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt.console.text import LONGEST_MESSAGE, UNSAFE, counted, duration, elided, figure, message, si, visible


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
    assert elided("abcdefghi"[:n], 8) == shown


def test_apostrophes_enclose_no_quotation():
    sentence = f"the run's folder {'and so on ' * 30} the model's weights"
    assert message(sentence) == sentence


def test_one_of_a_kind_is_in_the_singular():
    assert [counted(n, "document") for n in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]
    assert counted(2, "process", "processes") == "2 processes"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.5"),
        (999, "999"),
        (999.9, "1.00k"),
        (1500, "1.50k"),
        (124439808, "124M"),
        (9_999_999_999, "10.0B"),
        (1e15, "1.00P"),
        (3.14e23, "314Z"),
    ],
)
def test_si_shows_three_digits(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (9.999, "10.0"), (53.81, "53.8"), (1234.5, "1,230")]
)
def test_figure_shows_three_digits_without_an_exponent(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0204, "20 ms"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (92, "1 min 32 s"),
        (3599.7, "1 h 00 min"),
        (6540, "1 h 49 min"),
        (266400, "3 d 2 h"),
    ],
)
def test_duration_shows_the_two_units_that_matter(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 FLOP"), (999.6e3, "1.00 MFLOP"), (1e9, "1.00 GFLOP"), (4.4808e14, "448 TFLOP")]
)
def test_a_unit_follows_its_prefix_and_a_billion_is_giga(value, text):
    assert si(value, "FLOP") == text
