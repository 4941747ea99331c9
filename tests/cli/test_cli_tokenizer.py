"""`regpt tokenizer inspect`, as it is typed."""

import io
import json
import re

import pytest

from regpt.console.drawing import PlainConsole, print_cells
from tokenizer_files import write_family


@pytest.fixture
def folder(tmp_path):
    return write_family("llama3", tmp_path / "llama", generation_config={"eos_token_id": [400]})


def test_tables_are_printed_and_the_text_is_split(regpt, folder):
    code, out, err = regpt("tokenizer", "inspect", folder, "I'm 東京\n")
    assert (code, err) == (0, "")
    for title in ("vocabulary", "special token", "the text is", "bytes/token", "longest tokens", "encodes to other"):
        assert title in out
    assert "│" in out.split("the text is")[1].splitlines()[1]
    assert "starts documents, ends text" in out


def test_json_has_what_the_tables_have(regpt, folder):
    code, out, _ = regpt("tokenizer", "inspect", folder, "the fox", "--json")
    report = json.loads(out)
    assert code == 0
    assert b"".join(bytes(token["text"], "utf-8") for token in report["split"]) == b"the fox"
    assert report["ids"] == report["learned"] + report["special"]
    assert [text["name"] for text in report["texts"]][:2] == ["English", "German"]
    assert report["special_tokens"][0]["roles"] == ["starts documents", "ends text"]
    assert regpt("tokenizer", "inspect", folder, "--json")[1].startswith('{"name": "bpe-')


def test_a_file_is_measured_instead_of_the_sentences(regpt, folder, tmp_path):
    (tmp_path / "own.txt").write_text("the fox " * 20, encoding="utf-8")
    _, out, _ = regpt("tokenizer", "inspect", folder, "--file", tmp_path / "own.txt", "--json")
    (text,) = json.loads(out)["texts"]
    assert (text["name"], text["text_bytes"]) == ("own.txt", 160)


@pytest.mark.parametrize(
    ("args", "content", "code", "said"),
    [
        (["inspect", "nowhere"], None, 2, "there is no tokenizer 'nowhere'"),
        (["inspect", "gpt3"], None, 2, "did you mean 'gpt2'"),
        (["inspect", "{file}"], "{", 1, "is not JSON"),
        (["inspect", "{file}"], '{"model": {"type": "WordPiece", "vocab": {}}}', 1, "its model is 'WordPiece'"),
        (["inspect", "bytes", "--file", "{folder}"], None, 1, "it is not a file"),
        (["inspect"], None, 2, "NAME|FOLDER"),
        (["inspekt"], None, 2, "did you mean 'inspect'"),
    ],
)
def test_what_is_wrong_is_one_sentence(regpt, tmp_path, args, content, code, said):
    file = tmp_path / "tokenizer.json"
    if content:
        file.write_text(content, encoding="utf-8")
    found, out, err = regpt("tokenizer", *(arg.format(file=file, folder=tmp_path) for arg in args))
    assert (found, out) == (code, "")
    assert said in err
    assert len(err.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_neighbours_have_two_colours_and_ids_stand_below():
    shown = Terminal()
    console = PlainConsole(file=shown)
    console.width = 12
    print_cells(["Hello", " wor", "ld\x1b", "日本"], ["15496", "1", "22", "333"], "│", console)
    styles = re.compile(r"\x1b\[([\d;]+)m([^\x1b]*)")
    lines = [styles.findall(line) for line in shown.getvalue().splitlines()]
    texts = [[(style, text) for style, text in line if style != "0"] for line in lines]
    assert texts[0] == [("30;46", "Hello"), ("30;43", " wor")]
    assert texts[1] == [("2", "15496 "), ("2", "1    ")]  # as wide as what stands above
    assert texts[2] == [("30;46", "ld\\x1b"), ("30;43", "日本")]  # four columns
    assert texts[3] == [("2", "22     "), ("2", "333  ")]
