"""The pages of `regpt explain`: their programs print what the page shows, answers hold, links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from regpt.__main__ import main
from regpt.learn.pages import FOLDER, lesson_names, notebook_of, read_lesson

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", lesson_names())
def test_a_page_runs_and_prints_what_it_shows_and_its_answer_holds(name, capsys):
    lesson = read_lesson(name)
    exec(compile(lesson.program, f"{name}.md", "exec"), {})
    assert capsys.readouterr().out == lesson.output
    exec(compile(lesson.answer, f"{name}.md, answer", "exec"), {})
    assert "assert " in lesson.answer
    assert len(lesson.program.splitlines()) <= 20


@pytest.mark.parametrize("name", lesson_names())
def test_a_page_has_a_picture_a_place_in_the_source_and_papers(name):
    lesson = read_lesson(name)
    assert re.findall(r"!\[[^\]]{20,}\]\((.*?)\)", lesson.text) == [f"{name}.svg"]
    assert f'"{name}": ' in (ROOT / "benchmarks/learn_pictures.py").read_text(encoding="utf-8")
    links = re.findall(r"\[`[^`]+`\]\((\S+?)\)", lesson.section("In the source"))
    assert links
    for link in links:
        assert (FOLDER / link).resolve().is_file(), link
    for named in re.findall(r"\[`(\S+?)`\]\(\S+?\)((?: and)? `[^;.]*)", lesson.section("In the source")):
        source = (FOLDER.parent / named[0]).read_text(encoding="utf-8")
        for function in re.findall(r"`(\w+)`", named[1]):
            assert f"def {function}(" in source, (named[0], function)
    assert re.search(r"\b(?:19|20)\d\d\b", lesson.section("Papers"))
    assert f"(../src/regpt/learn/{name}.md)" in (ROOT / "docs/learn.md").read_text(encoding="utf-8")
    assert f"learn/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", lesson_names())
def test_a_picture_is_legible_on_light_and_dark_and_has_named_axes(name):
    picture = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert len(picture) < 150_000
    texts = re.findall(r"<text([^>]*)>", picture)
    assert len(texts) > 4
    assert all("fill: #7f7f7f" in text for text in texts)
    assert not re.search(r"fill: (?:#000000|#ffffff|black|white)\b", picture)


def test_topics_are_listed_and_one_is_printed(capsys):
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in lesson_names())
    assert main(["explain", "softmax"]) == 0
    assert capsys.readouterr().out.startswith(read_lesson("softmax").text)  # not drawn, not wrapped


def test_an_unknown_topic_is_one_sentence_that_names_what_is_near(capsys):
    assert main(["explain", "sofmax"]) == 2
    assert "topics are softmax (all: regpt explain)" in capsys.readouterr().err
    assert main(["explain", "--notebook", "x.ipynb"]) == 2


def test_a_page_is_a_notebook_whose_cells_run(tmp_path, capsys):
    file = tmp_path / "page.ipynb"
    assert main(["explain", "gradient-accumulation", "--notebook", str(file)]) == 0
    notebook = json.loads(file.read_text(encoding="utf-8"))
    assert notebook == json.loads(json.dumps(notebook_of(read_lesson("gradient-accumulation"))))
    names: dict[str, object] = {}
    capsys.readouterr()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert capsys.readouterr().out == read_lesson("gradient-accumulation").output
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
