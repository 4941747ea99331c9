"""After a step back, rows of the timeline that the run left do not count."""

from run_files import train_row, val_row, write_rows

from regpt.report.charts import events
from regpt.report.compare import compare
from regpt.report.health import epochs_read
from regpt.report.read import current_samples, read_run
from regpt.report.summary import sentence, summarize


def event(name, step, **more):
    return {"kind": "event", "name": name, "step": step, **more}


def trains(first, last, **changes):
    return [train_row(step, **changes) for step in range(first, last + 1)]


def steps(rows):
    return [row["step"] for row in rows]


def test_rows_beyond_a_resume_from_an_older_checkpoint_are_left_out(make_run):
    score = {"kind": "eval", "task": "mc", "metric": "acc", "value": 0.9}
    before = [*trains(1, 30), val_row(30, 1.0), score | {"step": 30}, event("epochs", 30, epochs={"d": 9.0})]
    after = [event("resume", 10), *trains(11, 20), val_row(20, 3.0), event("epochs", 20, epochs={"d": 2.0})]
    samples = [{"step": step, "prompt": "a", "texts": ["a"], "time": 0.0} for step in (0, 10, 30)]
    run = read_run(make_run(rows=[val_row(0, 8.0), *before, *after], samples=samples))
    assert steps(run.train) == list(range(1, 21))
    assert [(row["step"], row["loss"]) for row in run.val] == [(0, 8.0), (20, 3.0)]
    assert (run.evals, steps(run.samples)) == ([], [0, 10])
    assert epochs_read(run) == 2.0
    assert "20 steps of 40" in sentence(summarize(run))


def test_a_resume_after_which_nothing_was_made_ends_at_its_checkpoint(make_run):
    run = read_run(make_run(rows=[*trains(1, 30), val_row(30, 1.0), event("resume", 10)]))
    assert (steps(run.train), run.val) == (list(range(1, 11)), [])


def test_each_of_several_steps_back_counts(make_run):
    parts = [event("resume", 20), *trains(21, 25), event("rewind", 5), *trains(6, 8), event("resume", 8), *trains(9, 9)]
    run = read_run(make_run(rows=[*trains(1, 30, loss=1.0), *parts]))
    assert steps(run.train) == list(range(1, 10))
    assert {row["loss"] for row in run.train[:5]} == {1.0}
    assert 1.0 not in {row["loss"] for row in run.train[5:]}


def test_what_happened_on_the_timeline_that_was_left_is_still_told(make_run):
    rows = [*trains(1, 30), event("non_finite", 30, policy="rewind"), event("rewind", 10), *trains(11, 12)]
    run = read_run(make_run(rows=rows))
    assert [row["name"] for row in run.events] == ["rewind", "non_finite"]
    assert [one["name"] for one in events(run)] == ["rewind"]  # a chart of 12 steps has no place for step 30


def test_samples_of_steps_that_were_made_again_count_from_the_new_timeline(make_run):
    rows = [*trains(1, 30, time=1.0), event("resume", 10, time=2.0), *trains(11, 40, time=3.0)]
    samples = [
        {"step": step, "prompt": "a", "texts": [str(time)], "time": time} for step, time in ((20, 1.0), (25, 3.0))
    ]
    run = read_run(make_run(rows=rows, samples=samples))
    assert steps(run.samples) == [25]


def test_one_row_out_of_order_moves_no_other(make_run):
    for i, rows in enumerate(
        (
            [*trains(1, 30), train_row(3, loss=7.0), *trains(31, 40)],
            [*trains(1, 40), train_row(3, loss=7.0)],
            [*trains(1, 2), train_row(4), train_row(3, loss=7.0), *trains(5, 40)],
        )
    ):
        run = read_run(make_run(rows=rows, name=f"run-{i}"))
        assert steps(run.train) == list(range(1, 41))
        assert run.train[2]["loss"] == 7.0


def test_items_of_the_timeline_that_was_left_are_not_compared(make_run):
    folders = []
    for name, right in (("a", 0), ("b", 1)):
        score = {"kind": "eval", "step": 20, "task": "mc", "metric": "acc", "value": 0.5, "stderr": 0.1}
        folder = make_run(rows=[*trains(1, 30), event("resume", 10), *trains(11, 20), score], name=name)
        (folder / "evals").mkdir()
        write_rows(folder / "evals" / "mc-step-00000030.jsonl", [{"item": i, "acc": right} for i in range(20)])
        folders.append(read_run(folder))
    (one,) = (one for one in compare(*folders).measures if one.name == "mc acc")
    assert one.test is not None
    assert one.test.name == "z of the two errors, unpaired"


def test_a_sample_beyond_the_last_logged_update_counts_where_the_run_never_went_back():
    samples = [{"step": step, "texts": ["a"]} for step in (10, 25)]
    made = trains(1, 20)
    assert current_samples(samples, made) == samples
    assert current_samples(samples, [*made, event("resume", 15)]) == samples[:1]
