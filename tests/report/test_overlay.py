"""Several runs in one report: common units, reference figures only where they apply, and what differs."""

import json
from math import log

import pytest
from run_files import CONFIG, ENV, train_row, val_row
from test_page import check

from regpt.cli.report import main
from regpt.errors import UserError
from regpt.report.charts import charts, loss_references, task_references
from regpt.report.page import write_overlay, write_report
from regpt.report.read import differences, differing, read_run
from regpt.report.series import bytes_per_token, need_bits


def env(**data):
    return ENV | {"data": ENV["data"] | data}


def overlay(tmp_path, *folders):
    """The page's parsed HTML and the data of its script."""
    page = check(write_overlay(list(folders), tmp_path / "overlay.html").read_text(encoding="utf-8"))
    return page, json.loads(page.scripts[0])


def test_each_run_has_one_line_in_each_chart(make_run, tmp_path):
    page, data = overlay(tmp_path, make_run(), make_run(name="run-2"), make_run(name="run-3"))
    assert [run["name"] for run in data["runs"]] == ["run-1", "run-2", "run-3"]
    assert [panel["title"] for panel in data["panels"][:2]] == ["Validation loss", "Training loss"]
    for panel in data["panels"]:
        assert [line["run"] for line in panel["series"]] == [line["hue"] for line in panel["series"]] == [0, 1, 2]
    said = " ".join(page.text)
    assert "The configurations are the same." in said
    assert "Versions, commit and device are the same." in said


def test_a_ninth_run_has_the_first_colour_everywhere(make_run, tmp_path):
    runs = [make_run(name=f"run-{i}") for i in range(9)]
    page = write_overlay(runs, tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count('<span class="swatch" data-hue="0">') == 2 * page.count('<span class="swatch" data-hue="7">') > 0
    assert 'data-hue="8"' not in page


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    first = make_run(name="run")
    (tmp_path / "other").mkdir()
    second = first.rename(tmp_path / "other" / "run")
    _, data = overlay(tmp_path, make_run(name="run"), second)
    assert [run["name"] for run in data["runs"]] == [f"{tmp_path.name}/run", "other/run"]


def test_runs_of_one_tokenizer_are_compared_in_nats(make_run, tmp_path):
    _, data = overlay(tmp_path, make_run(), make_run(name="b"))
    assert data["panels"][0]["unit"] == "nats per token"
    assert data["runs"][0]["columns"]["val_loss"][-1] == 3.25


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(make_run, tmp_path):
    a = make_run(env=env(tokenizer_sha256="1", train_tokens=1000, train_bytes=5000))
    b = make_run(env=env(tokenizer_sha256="2"), name="b")
    _, data = overlay(tmp_path, a, b)
    assert [panel["unit"] for panel in data["panels"][:2]] == ["bits per byte", "bits per byte, smoothed"]
    assert "different tokenizers" in data["panels"][0]["note"]
    assert data["runs"][0]["columns"]["val_loss"][-1] == pytest.approx(3.25 / 4)  # the run's own bpb
    first = data["runs"][0]["columns"]["loss_smooth"][1]
    assert first == pytest.approx(8.0 / (log(2) * 5), rel=1e-5)  # 5 bytes a token of training text
    # b does not say how long its training text is: the validation text's 4 / ln 2 bytes a token stand in for it
    assert data["runs"][1]["columns"]["loss_smooth"][1] == pytest.approx(8.0 / (log(2) * 4 / log(2)), rel=1e-5)


def test_a_tokenizer_is_known_by_its_hash_else_by_name_and_size(make_run):
    def run(name, config=CONFIG, **data):
        return read_run(make_run(env=env(**data), config=config, name=name))

    hashed = [run("a", tokenizer_sha256="1", tokenizer="x"), run("b", tokenizer_sha256="1", tokenizer="y")]
    assert not need_bits(hashed)
    assert need_bits([hashed[0], run("c", tokenizer_sha256="2", tokenizer="x")])
    larger = CONFIG.replace("n_layer = 2", "n_layer = 2\nvocab_size = 99")
    assert need_bits([run("d"), run("e", config=larger)])
    assert not need_bits([run("f"), run("g")])


def test_a_run_without_bits_per_byte_cannot_be_compared_across_tokenizers(make_run, tmp_path, capsys):
    a = make_run(env=env(tokenizer_sha256="1"))
    b = make_run(rows=[train_row(1), train_row(2)], env=env(tokenizer_sha256="2", train_tokens=None), name="b")
    with pytest.raises(UserError, match=r"'b' and 'run-1' have different tokenizers.*'b' has none"):
        main([str(a), str(b), "--out", str(tmp_path / "x.html")])


def test_bytes_per_token_come_from_the_training_text_first(make_run):
    run = read_run(make_run(env=env(train_tokens=100, train_bytes=430)))
    assert bytes_per_token(run) == 4.3
    assert bytes_per_token(read_run(make_run(env={}, name="b"))) == pytest.approx(4 / log(2))


def test_what_differs_is_listed_and_nothing_else(make_run):
    other = CONFIG.replace("n_layer = 2", "n_layer = 3").replace("grad_clip = 1.0\n", "")
    runs = [read_run(make_run()), read_run(make_run(config=other, env=env(manifest_sha256="2"), name="b"))]
    assert differences(runs)["config"] == [("model.n_layer", [2, 3]), ("train.grad_clip", [1.0, None])]
    assert differences(runs)["data"] == [("manifest_sha256", [None, "2"])]


def test_nested_tables_are_compared_key_by_key():
    assert differing([{"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [2]}, "d": 3}]) == [
        ("a.c", [[1], [2]]),
        ("d", [None, 3]),
    ]


def test_the_page_of_several_runs_names_what_differs(make_run, tmp_path):
    other = make_run(config=CONFIG.replace("n_layer = 2", "n_layer = 3"), name="b")
    said = " ".join(overlay(tmp_path, make_run(), other)[0].text)
    assert "model.n_layer" in said
    assert "model.n_head" not in said


def test_gpt2_s_loss_is_drawn_only_over_fineweb_edu_in_gpt2_tokens(make_run):
    edu = ["hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet", "edufineweb_train_000001.npy"]

    def references(name, **data):
        return [one.value for one in loss_references([read_run(make_run(env=env(**data), name=name))])]

    assert references("a", tokenizer="gpt2", sources=edu) == [3.2924]
    assert references("b", tokenizer="gpt2", sources=[*edu, "other.txt"]) == []
    assert references("c", tokenizer="bpe", sources=edu) == []
    assert references("d", tokenizer="gpt2", sources=[]) == []
    assert references("e", tokenizer="gpt2") == []


def test_hellaswag_has_the_figures_of_gpt2_and_gpt3_under_the_metric_they_were_measured_in(make_run, tmp_path):
    values = {one.label: one.value for one in task_references("hellaswag", "acc_norm")}
    assert values == {"chance": 0.25, "GPT-2 124M": 0.2955, "GPT-3 124M": 0.337, "GPT-2 1558M": 0.489}
    assert task_references("hellaswag", "acc") == task_references("arc_easy", "acc_norm") == []


def test_tasks_have_charts_and_the_parts_of_a_benchmark_a_table(make_run, tmp_path):
    def row(task, metric, value, **more):
        return {"kind": "eval", "step": 2, "task": task, "metric": metric, "value": value, "n": 100} | more

    rows = [train_row(1), train_row(2), row("hellaswag", "acc_norm", 0.29, stderr=0.005), row("hellaswag", "acc", 0.28)]
    rows += [row("core", "centered", 0.1), row("core/piqa", "centered", 0.2), row("core", "missing", 3)]
    rows += [
        row("core", "centered_20_of_22", 0.15, missing=["coqa", "squad"]),
        row("core", "centered_20_of_22_ema", 0.1),
    ]

    page = check(write_report(make_run(rows=rows)).read_text(encoding="utf-8"))
    panels = {panel["title"]: panel for panel in json.loads(page.scripts[0])["panels"]}
    assert {"hellaswag", "core"} <= panels.keys()
    assert not {"core/piqa", "piqa", "missing"} & panels.keys()
    assert [line["label"] for line in panels["hellaswag"]["series"]] == ["acc_norm", "acc"]
    assert "Brown et al. 2020" in panels["hellaswag"]["note"]
    said = " ".join(" ".join(page.text).split())
    assert "core/piqa centered 0.2000" in said
    assert "0.2900 ± 0.0050" in said
    assert "core centered_20_of_22 without coqa, squad 0.1500 100 2 chance 0" in said
    assert [line["label"] for line in panels["core"]["references"]] == ["chance"]


def test_averaged_weights_have_lines_of_their_own(make_run):
    rows = [train_row(1), train_row(2), val_row(0, 8.0, loss_ema=8.0, bpb_ema=2.0), val_row(2, 7.0, loss_ema=7.5)]
    metrics = {"acc": 0.2, "acc_ema": 0.3, "acc_norm": 0.25, "acc_norm_ema": 0.35}
    rows += [
        {"kind": "eval", "step": 2, "task": "hellaswag", "metric": name, "value": value, "n": 100}
        for name, value in metrics.items()
    ]
    drawn = charts([read_run(make_run(rows=rows))])
    panels = {panel["title"]: [line["label"] for line in panel["series"]] for panel in drawn["panels"]}
    assert panels["Loss"] == ["train, each step", "train, smoothed", "validation", "validation, averaged weights"]
    assert drawn["runs"][0]["columns"]["val_loss_ema"] == [8.0, None, 7.5]
    assert panels["hellaswag"] == ["acc_norm", "acc", "acc_norm_ema", "acc_ema"]
    two = charts([read_run(make_run(rows=rows, name=name)) for name in "ab"])
    shown = {panel["title"]: [line["column"] for line in panel["series"]] for panel in two["panels"]}
    assert shown["hellaswag"] == ["eval:hellaswag/acc_norm"] * 2  # of the last weights
