"""Two runs against each other: what is paired with what, and what is said."""

import json
import random
from importlib import import_module

import pytest
from run_files import CONFIG, ENV, train_row, val_row, write_rows
from test_page import check

from regpt.cli.diff import comparison_dict, main, measure_dict
from regpt.errors import UsageError, UserError
from regpt.report.charts import difference
from regpt.report.compare import compare, headline_of_runs, measure_cells
from regpt.report.read import read_run, with_own_names

SEED = CONFIG + "[data]\nseed = {}\n"


def rows_of(loss, **val):
    rows = [train_row(step, loss=3 + loss + 5 / step) for step in range(1, 41)]
    return [*rows, val_row(0, 8.0), val_row(20, loss + 0.5), val_row(40, loss) | val]


def scored(make_run, name, right, *, loss=3.25, config=CONFIG, rows=(), task="hellaswag", metric="acc_norm", env=None):
    """A run whose evaluation got the items in `right` right, out of 200."""
    value = {"kind": "eval", "step": 40, "task": task, "metric": metric, "value": len(right) / 200, "n": 200}
    folder = make_run(rows=[*rows_of(loss), value | {"stderr": 0.03}, *rows], config=config, name=name, env=env)
    (folder / "evals").mkdir()
    write_rows(
        folder / "evals" / f"{task.replace('/', '-')}-step-00000040.jsonl",
        [{"item": i, "correct": int(i in right), "acc": 1} for i in range(200)],
    )
    return folder


def measures(*folders, seeds=()):
    a, b = (read_run(folder) for folder in folders)
    return {one.name: one for one in compare(a, b, [read_run(folder) for folder in seeds]).measures}


def test_items_are_paired_by_their_name_whatever_their_order(make_run):
    a, b = scored(make_run, "a", set(range(60))), scored(make_run, "b", set(range(50, 120)))
    path = b / "evals" / "hellaswag-step-00000040.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    one = measures(a, b)["hellaswag acc_norm"]
    assert one.test is not None
    assert (one.test.name, one.test.n) == ("McNemar, exact", 200)
    assert one.test.difference == pytest.approx(one.difference) == pytest.approx(0.05)
    assert one.test.interval[0] < 0 < one.test.interval[1]
    assert one.better == "b"


def test_only_items_that_both_have_are_compared(make_run):
    a, b = scored(make_run, "a", {1, 2}), scored(make_run, "b", {1, 3})
    path = b / "evals" / "hellaswag-step-00000040.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:150]), encoding="utf-8")
    test = measures(a, b)["hellaswag acc_norm"].test
    assert test is not None
    assert test.n == 150


def test_correct_stands_for_the_headline_metric_only(make_run):
    row = {"kind": "eval", "step": 40, "task": "hellaswag", "metric": "acc", "value": 0.3, "stderr": 0.03, "n": 200}
    found = measures(
        scored(make_run, "a", {1}, rows=[row]), scored(make_run, "b", {2, 3, 4}, rows=[row | {"value": 0.4}])
    )
    assert found["hellaswag acc_norm"].test.difference == pytest.approx(2 / 200)
    assert found["hellaswag acc"].test.difference == 0  # the items' own `acc`, which is 1 for all of them


def test_the_loss_of_averaged_weights_is_shown_but_has_no_items(make_run):
    folders = [scored(make_run, "a", {1}, loss=3.0), scored(make_run, "b", {2}, loss=3.2)]
    for folder, average in zip(folders, (2.9, 2.8)):
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(val_row(40, 3.0, loss_ema=average)) + "\n")
        write_rows(folder / "evals" / "val-step-00000040.jsonl", [{"item": i, "loss": 3.0, "tokens": 9} for i in "xyz"])
    one = measures(*folders)["averaged weights: validation loss"]
    assert (one.better, one.test, one.why) == ("b", None, "not tested: no scores")


def test_parts_of_a_benchmark_find_their_files(make_run):
    folders = [
        scored(make_run, name, right, task="core/piqa", metric="centered") for name, right in (("a", {1}), ("b", {2}))
    ]
    assert measures(*folders)["core/piqa centered"].test.n == 200


def test_the_items_of_the_last_step_count(make_run):
    folders = [scored(make_run, name, {1, 2}) for name in "ab"]
    for folder in folders:
        write_rows(folder / "evals" / "hellaswag-step-00000020.jsonl", [{"item": 1, "correct": 0}])
    assert measures(*folders)["hellaswag acc_norm"].test.n == 200


def test_validation_windows_are_paired(make_run):
    folders = [make_run(rows=rows_of(loss), name=name) for name, loss in (("a", 3.3), ("b", 3.2))]
    draw = random.Random(1)
    hard = [draw.gauss(3, 1) for _ in range(50)]
    for folder, shift in zip(folders, (0.0, -0.1)):
        (folder / "evals").mkdir()
        rows = [{"item": i, "loss": x + shift + draw.gauss(0, 0.01), "source": "ab"[i % 2]} for i, x in enumerate(hard)]
        write_rows(folder / "evals" / "val-step-00000040.jsonl", rows)
    found = measures(*folders)
    one = found["validation loss"]
    assert (one.test.name, one.test.n) == ("paired t", 50)
    assert found["bits per byte"].test is None  # the items have none
    assert one.test.p < 1e-20
    assert one.lower
    assert one.better == "b"


def test_one_window_is_no_sample(make_run):
    """Its difference has no spread, so it is neither chance nor certain."""
    for stderr in (None, 0.01):
        known = {} if stderr is None else {"stderr": stderr}
        folders = [
            make_run(rows=rows_of(loss, **known), name=f"{name}{stderr}") for name, loss in (("a", 3.3), ("b", 3.2))
        ]
        for folder, loss in zip(folders, (3.3, 3.2)):
            (folder / "evals").mkdir()
            write_rows(folder / "evals" / "val-step-00000040.jsonl", [{"item": 0, "loss": loss}])
        one = measures(*folders)["validation loss"]
        if stderr is None:
            assert (one.test, one.why) == (None, "not tested: one item has no spread")
        else:
            assert one.test.name == "z of the two errors, unpaired"
            assert one.test.interval[0] < -0.1 < one.test.interval[1]


def test_validation_of_one_source_has_its_own_items(make_run):
    folders = []
    for name, loss in (("a", 3.3), ("b", 3.2)):
        part = val_row(40, loss) | {"source": "books"}
        folders.append(make_run(rows=[*rows_of(loss), part], name=name))
        (folders[-1] / "evals").mkdir()
        rows = [{"item": i, "loss": loss + i / 100, "source": ["books", "web"][i % 2]} for i in range(10)]
        write_rows(folders[-1] / "evals" / "val-step-00000040.jsonl", rows)
    assert measures(*folders)["validation loss, books"].test.n == 5
    assert measures(*folders)["validation loss"].test.n == 10


def test_without_items_the_errors_of_the_two_numbers_are_used(make_run):
    folders = [make_run(rows=rows_of(loss, stderr=0.01), name=name) for name, loss in (("a", 3.3), ("b", 3.2))]
    one = measures(*folders)["validation loss"]
    assert one.test.name == "z of the two errors, unpaired"
    plain = [make_run(rows=rows_of(loss), name=name) for name, loss in (("c", 3.3), ("d", 3.2))]
    assert measures(*plain)["validation loss"].conclusion() == "not tested: no scores"


def test_losses_on_other_text_are_not_tested(make_run):
    def env(sha):
        return ENV | {"data": ENV["data"] | {"manifest_sha256": sha}}

    folders = [make_run(rows=rows_of(3.2, stderr=0.01), name=name, env=env(name)) for name in "ab"]
    assert measures(*folders)["validation loss"].conclusion() == "not tested: other data"


def test_different_tokenizers_leave_bits_per_byte_only(make_run):
    folders = [make_run(name=name, env=ENV | {"data": {"tokenizer": name}}) for name in "ab"]
    assert set(measures(*folders)) == {"bits per byte"}


def seeded(make_run, name, seed, loss, config=SEED):
    return make_run(rows=rows_of(loss), config=config.format(seed), name=name)


def test_seeds_say_whether_a_difference_exceeds_their_noise(make_run):
    a = seeded(make_run, "a", 1, 3.300)
    seeds = [seeded(make_run, f"a{i}", i, 3.3 + 0.001 * i) for i in (2, 3, 4)]
    wider = SEED.replace("n_embd = 64", "n_embd = 128")
    near, far = (seeded(make_run, name, 1, loss, wider) for name, loss in (("near", 3.301), ("far", 3.2)))
    one = measures(a, near, seeds=seeds)["validation loss"]
    assert one.seeds.runs == (4, 1)
    assert one.conclusion() == "within the noise between seeds"
    assert measures(a, far, seeds=seeds)["validation loss"].conclusion() == "exceeds the noise between seeds"


def test_each_seed_run_belongs_to_the_configuration_it_repeats(make_run):
    wider = SEED.replace("n_embd = 64", "n_embd = 128")
    a, b = seeded(make_run, "a", 1, 3.3), seeded(make_run, "b", 1, 3.2, wider)
    seeds = [
        seeded(make_run, "a2", 2, 3.31),
        seeded(make_run, "b2", 2, 3.21, wider),
        seeded(make_run, "b3", 3, 3.2, wider),
    ]
    assert measures(a, b, seeds=seeds)["validation loss"].seeds.runs == (2, 3)


def test_a_run_that_differs_in_more_than_its_seeds_is_refused(make_run):
    a, b = seeded(make_run, "a", 1, 3.3), seeded(make_run, "b", 2, 3.2)
    other = seeded(make_run, "other", 3, 3.2, SEED.replace("n_layer = 2", "n_layer = 3"))
    with pytest.raises(UserError, match=r"'other' of --seeds differs from 'a' in more .* \(model.n_layer\)"):
        measures(a, b, seeds=[other])


@pytest.mark.parametrize("line", ["{", "[1]", '{"correct": 1}', '{"item": [1]}', '{"item": 1}', "[" * 200_000])
def test_a_line_that_is_no_item_is_left_out_and_said(make_run, line, capsys):
    a, b = scored(make_run, "a", {1}), scored(make_run, "b", {1})
    file = b / "evals" / "hellaswag-step-00000040.jsonl"
    plain = measures(a, b)
    with file.open("a", encoding="utf-8") as items:
        items.write(line + "\n")
    assert measures(a, b) == plain
    assert capsys.readouterr().err.startswith("regpt: warning: ")


def test_the_headline_says_who_is_better_and_whether_it_is_more_than_chance(make_run):
    a = make_run(rows=rows_of(3.3, stderr=0.01), name="a")
    b = make_run(rows=rows_of(3.2, stderr=0.01), name="b")
    said = headline_of_runs(compare(read_run(a), read_run(b)))
    assert said.startswith("b has the better validation loss: 3.2000 against 3.3000, a significant difference (z of")
    assert headline_of_runs(compare(read_run(a), read_run(make_run(rows=rows_of(3.3), name="c")))).startswith(
        "Both runs have the same validation loss, 3.3000"
    )
    bare = [read_run(make_run(rows=[train_row(1)], name=name)) for name in ("d", "e")]
    assert "no measure in common" in headline_of_runs(compare(*bare))


def test_curves_are_compared_after_as_many_tokens(make_run):
    a = make_run(rows=[*(train_row(step) for step in range(1, 41)), val_row(20, 3.5), val_row(40, 3.0)], name="a")
    rows = [*(train_row(step, tokens=2048 * step) for step in range(1, 21)), val_row(10, 3.4), val_row(15, 3.2)]
    found = compare(read_run(a), read_run(make_run(rows=rows, name="b")))
    assert found.curve == [(20480, 3.5, 3.4)]


def test_the_difference_is_that_of_b_from_a_after_as_many_tokens():
    found = difference([0, 10, 20, 30], [4.0, 3.0, None, 1.0], [5, 15, 25], [4.0, 3.0, None])
    assert found == [None, pytest.approx(0.5), None, None]  # between 4.0 and 3.0, less 3.0; beyond 15 nothing is known


def trained(make_run, name, steps, *, losses, planned=40, **more):
    """A run of `steps` updates that was validated at the steps of `losses`."""
    rows = [train_row(step) for step in range(1, steps + 1)]
    rows += [val_row(step, loss, stderr=0.01, **more) for step, loss in losses.items()]
    return make_run(rows=rows, name=name, config=CONFIG.replace("steps = 40", f"steps = {planned}"))


def test_unequal_training_is_said_before_who_is_better_and_where_both_had_read_as_much(make_run):
    a = trained(make_run, "a", 40, losses={20: 3.0, 40: 2.5})
    b = trained(make_run, "b", 20, losses={20: 2.8})
    said = headline_of_runs(compare(read_run(a), read_run(b)))
    assert said.startswith(
        "Unequal training: a has made 40 steps on 40,960 tokens; b has made 20 steps on 20,480 tokens, unfinished "
        "(40 planned). After as many tokens (20,480; step 20 of A, 20 of B): b has the better validation loss: 2.8000 "
        "against 3.0000, a significant difference (z of"
    )
    assert "At the end of each: a has the better validation loss: 2.5000 against 2.8000" in said


def test_unequal_training_without_a_common_point_names_both_steps(make_run):
    a = trained(make_run, "a", 40, losses={40: 2.5})
    b = trained(make_run, "b", 10, losses={10: 2.8}, planned=10)
    found = compare(read_run(a), read_run(b))
    said = headline_of_runs(found)
    assert said.startswith(
        "Unequal training: a has made 40 steps on 40,960 tokens; b has made 10 steps on 10,240 tokens."
    )
    assert said.endswith("(A after step 40, B after step 10).")
    (one,) = (one for one in found.measures if one.name == "validation loss")
    assert one.conclusion() == "unequal training; differs"
    assert measure_dict(one)["tokens_a"] == 40960
    assert not measure_dict(one)["equally_trained"]


def test_two_unfinished_runs_are_said_to_be_and_finished_ones_are_not(make_run):
    half = [trained(make_run, name, 20, losses={20: loss}) for name, loss in (("a", 3.0), ("b", 2.9))]
    whole = [trained(make_run, name, 40, losses={40: loss}) for name, loss in (("c", 3.0), ("d", 2.9))]
    assert headline_of_runs(compare(*map(read_run, half))).startswith(
        "Unfinished training: a has made 20 steps on 20,480 tokens,"
    )
    assert headline_of_runs(compare(*map(read_run, whole))).startswith("d has the better validation loss")


def test_validations_of_other_lengths_are_not_tested(make_run):
    a, b = (trained(make_run, name, 40, losses={40: 2.5}, tokens=n) for name, n in (("a", 1024), ("b", 4096)))
    assert measures(a, b)["validation loss"].conclusion() == "not tested: validated on 1,024 and 4,096 tokens"


def test_a_seed_that_read_less_is_refused(make_run):
    a, b, seed = (trained(make_run, name, steps, losses={20: 2.5}) for name, steps in (("a", 40), ("b", 40), ("s", 20)))
    with pytest.raises(UserError, match="'s' of --seeds has read 20,480 tokens, 'a' 40,960; finish the shorter one"):
        measures(a, b, seeds=[seed])


def test_the_units_of_a_test_are_named(make_run):
    folders = []
    for name, loss in (("a", 3.0), ("b", 2.9)):
        folders.append(scored(make_run, name, {1, 2}, loss=loss))
        rows = [{"item": i, "loss": loss + i / 100, "tokens": 9} for i in range(8)]
        write_rows(folders[-1] / "evals" / "val-step-00000040.jsonl", rows)
    found = compare(*map(read_run, folders))
    assert "over 8 validation batches, paired t" in headline_of_runs(found)
    tests = [measure_cells(one)[5] for one in found.measures]
    assert {"paired t, 8 validation batches", "McNemar, exact, 200 items"} <= set(tests)


def test_the_command_prints_a_table_and_writes_the_page(make_run, tmp_path, capsys):
    a, b = scored(make_run, "a", {1, 2, 3}), scored(make_run, "b", set(range(9)), config=CONFIG.replace("2", "3"))
    assert main([str(a), str(b), "--out", str(tmp_path / "diff.html")]) == 0
    said = capsys.readouterr().out
    for words in ("hellaswag acc_norm", "model.n_layer", "McNemar", "data: the same", str(tmp_path / "diff.html")):
        assert words in said
    page = check((tmp_path / "diff.html").read_text(encoding="utf-8"))
    data = json.loads(page.scripts[0])
    assert [panel["title"] for panel in data["panels"][:3]] == ["Validation loss", "Training loss", "B - A"]
    assert data["runs"][0]["columns"]["difference:val_loss"][-1] == 0
    assert "hellaswag acc_norm" in page.text


def test_json_has_everything(make_run, capsys):
    a, b = scored(make_run, "a", {1, 2, 3}), scored(make_run, "b", set(range(9)), loss=3.0)
    assert main([str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one = next(one for one in found["measures"] if one["name"] == "hellaswag acc_norm")
    assert one["test"]["name"] == "McNemar, exact"
    assert one["better"] == "b"
    assert found["curve"][-1] == {"tokens": 40960, "a": 3.25, "b": 3.0}
    runs = [read_run(a), read_run(b)]
    assert json.loads(json.dumps(comparison_dict(compare(*with_own_names(runs))))) == found


def test_a_run_cannot_be_compared_with_itself(make_run):
    run = str(make_run())
    with pytest.raises(UsageError, match="given twice"):
        main([run, run])


def test_a_run_of_the_same_seeds_is_no_other_seed(make_run):
    a, b = seeded(make_run, "a", 1, 3.3), seeded(make_run, "b", 2, 3.2)
    with pytest.raises(UserError, match=r"'twin' of --seeds has the seeds of 'a', so it says nothing of the noise"):
        measures(a, b, seeds=[seeded(make_run, "twin", 1, 3.3)])
    second = seeded(make_run, "second", 3, 3.3)
    with pytest.raises(UserError, match=r"'third' of --seeds has the seeds of 'second'"):
        measures(a, b, seeds=[second, seeded(make_run, "third", 3, 3.31)])


@pytest.mark.parametrize("command", ["report", "diff"])
def test_no_file_of_another_kind_is_replaced_by_a_page(make_run, tmp_path, command):
    a, b = make_run(name="a"), make_run(name="b")
    before = (a / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"config.toml' is no name of an HTML file; end it in .html$"):
        import_module(f"regpt.cli.{command}").main([str(a), str(b), "--out", str(a / "config.toml")])
    assert (a / "config.toml").read_bytes() == before
