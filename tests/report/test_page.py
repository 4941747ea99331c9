"""The report as a file: self-contained, small, and safe whatever a run says."""

import json
import re
from html.parser import HTMLParser

import pytest
from run_files import train_row

from regpt.cli.report import main
from regpt.errors import UsageError, UserError
from regpt.report.markup import embed_json, printable
from regpt.report.page import SCRIPTS, asset, write_report

VOID = {"meta", "link", "br", "input", "img", "hr"}
HOSTILE = "</script><script>x=1</script><img src=x onerror='x=1'> \"&lt;\" \x00\x07\x1b[31m\u2028\u2029\ud800 <!--"


class Checker(HTMLParser):
    """Collects elements, attributes and the text of scripts; fails on a tag that closes another."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.scripts, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


def hostile_run(make_run):
    samples = [
        {"step": 0, "prompt": HOSTILE, "texts": [HOSTILE, HOSTILE + HOSTILE, 7, None]},
        {"step": 1, "prompt": None, "texts": "no list"},
    ]
    name = re.sub(r"[\x00-\x1f\ud800]", "", HOSTILE)
    env = {
        "device": name,
        "argv": ["regpt", name],
        "data": {name: name},
        "regpt": name,
        name: {"a": [name]},
        "started": 1e300,
    }
    rows = [train_row(1), train_row(2), {"kind": "event", "step": 1, "name": HOSTILE, "why": HOSTILE}]
    rows += [{"kind": "eval", "step": 2, "task": HOSTILE, "metric": HOSTILE, "value": 0.5}]
    return make_run(
        rows=rows,
        samples=samples,
        env=env,
        config=f"[model]\n{json.dumps(name)} = {json.dumps(name)}\n",
        name="a<b>&'c'",
    )


def test_the_page_is_well_formed_and_loads_nothing(make_run):
    page = write_report(make_run()).read_text(encoding="utf-8")
    checker = check(page)
    for _, attributes in checker.elements:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page


def test_the_page_shows_the_run(make_run):
    said = " ".join(check(write_report(make_run()).read_text(encoding="utf-8")).text)
    for words in (
        "run-1",
        "30 July 2026, 10:03 UTC",
        "2.84",
        "41.0",
        "n_embd",
        "3,210,041",
        "regpt train quickstart --out 'a run'",
    ):
        assert words in said


def test_nothing_a_run_says_becomes_markup(make_run):
    plain = check(write_report(make_run()).read_text(encoding="utf-8"))
    page = check(write_report(hostile_run(make_run)).read_text(encoding="utf-8"))
    assert sum(tag == "script" for tag, _ in page.elements) == sum(tag == "script" for tag, _ in plain.elements) == 3
    assert not [tag for tag, _ in page.elements if tag == "img"]
    data = json.loads(page.scripts[0])
    assert data["runs"][0]["samples"][0]["texts"] == [printable(HOSTILE), printable(HOSTILE + HOSTILE), "7", "None"]


def test_embedded_json_cannot_end_its_script_and_reads_back():
    data = {"text": HOSTILE.replace("\ud800", ""), "values": [1, 0.5, None]}
    assert not set("<>&\u2028\u2029") & set(embed_json(data))
    assert json.loads(embed_json(data)) == data


def test_a_value_that_json_has_no_word_for_is_a_gap(make_run):
    folder = make_run(rows=[train_row(1), train_row(2, loss=float("nan"), grad_norm=float("inf"))])
    data = json.loads(check(write_report(folder).read_text(encoding="utf-8")).scripts[0])
    assert data["runs"][0]["columns"]["loss"] == [8.0, None]


def test_control_characters_are_shown_as_pictures():
    assert printable("a\x00\x1b\x7f\n\tb\ud800") == "a␀␛␡\n\tb\ufffd"


def test_a_chart_without_values_is_left_out(make_run):
    folder = make_run(rows=[train_row(1, mfu=0.4, grad_norm=None)])
    data = json.loads(check(write_report(folder).read_text(encoding="utf-8")).scripts[0])
    assert [panel["title"] for panel in data["panels"]] == ["Loss", "Learning rate", "Throughput", "MFU"]
    assert [series["label"] for series in data["panels"][0]["series"]] == ["train, each step", "train, smoothed"]
    assert data["panels"][0]["references"] == [{"label": "unigram model", "value": 4.5}]


def test_checkpoints_are_listed_but_not_marked(make_run):
    saved = {"kind": "event", "step": 1, "name": "checkpoint", "stall_ms": 12.5}
    rows = [train_row(1), saved, saved | {"name": "resume"}, saved | {"name": "non_finite", "policy": "skip"}]
    page = check(write_report(make_run(rows=rows)).read_text(encoding="utf-8"))
    assert [event["name"] for event in json.loads(page.scripts[0])["runs"][0]["events"]] == ["resume", "skip"]
    assert {"checkpoint", "resume", "non_finite"} <= set(page.text)


def test_the_lectures_full_run_stays_below_a_megabyte(make_run):
    rows = [
        train_row(step, loss=3 + 1 / (step + 0.123456789), mfu=0.4 + 1e-7 * step, peak_memory_gib=60.123)
        for step in range(1, 19074)
    ]
    samples = [{"step": step, "prompt": "Hello", "texts": ["word " * 40] * 4} for step in range(0, 19074, 250)]
    assert write_report(make_run(rows=rows, samples=samples)).stat().st_size < 1_000_000


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    folder = make_run()
    first, second = (write_report(folder, tmp_path / "new" / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["a.html", "b.html"]


def test_the_licence_of_the_plotting_library_is_in_the_page(make_run):
    page = write_report(make_run()).read_text(encoding="utf-8")
    assert asset("vendor/LICENSE-uPlot") in page
    assert "</script" not in "".join(map(asset, ("vendor/uPlot.iife.min.js", *SCRIPTS)))


def test_a_place_that_cannot_be_written_is_one_sentence(make_run, tmp_path):
    folder = make_run()
    with pytest.raises(UserError, match=r"cannot write .* choose another file with --out"):
        write_report(folder, tmp_path)
    assert not list(tmp_path.parent.glob("*.partial"))


def test_the_command_prints_where_the_report_is(make_run, capsys, tmp_path):
    folder = make_run()
    assert main([str(folder)]) == 0
    assert main([str(folder), "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "report.html"), str(tmp_path / "x.html")]


def test_the_command_says_what_several_runs_need(make_run, tmp_path):
    a, b = str(make_run()), str(make_run(name="run-2"))
    with pytest.raises(UsageError, match="no run was given"):
        main([])
    with pytest.raises(UsageError, match="add --out"):
        main([a, b])
    with pytest.raises(UsageError, match="given twice"):
        main([a, b, a, "--out", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()


def test_the_command_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        main([str(tmp_path / "nowhere")])
