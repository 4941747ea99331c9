"""The sentence and the figures of a report."""

import pytest
from run_files import train_row, val_row

from regpt.report.read import read_run
from regpt.report.summary import sentence, summarize, tiles


def test_the_sentence_says_what_happened(make_run):
    assert sentence(summarize(read_run(make_run()))) == (
        "A model of 2.84M parameters read 41.0k tokens in 40 steps and 20 s on CPU; its validation loss went "
        "from 8.000 to 3.250; a unigram model would reach 4.500."
    )


def test_the_sentence_tells_an_unfinished_run_and_an_earlier_best(make_run):
    rows = [val_row(0, 8.0), train_row(1), train_row(2), val_row(1, 3.0), val_row(2, 4.0)]
    said = sentence(summarize(read_run(make_run(rows=rows, env={"device": "NVIDIA H100", "world_size": 8}))))
    assert said == (
        "A model read 2.05k tokens in 2 steps of 40 and 1.0 s on 8 × NVIDIA H100; its validation loss went from "
        "8.000 to 4.000, with the best, 3.000, at step 1."
    )


@pytest.mark.parametrize(
    ("device", "world_size", "said"),
    [("cpu with 1 threads", 1, "CPU with 1 thread"), ("cpu with 12 threads", 2, "2 × CPU with 12 threads")],
)
def test_a_processor_is_named_with_its_threads(make_run, device, world_size, said):
    run = read_run(make_run(rows=[train_row(1)], env={"device": device, "world_size": world_size}))
    assert summarize(run).device == said


def test_a_run_that_says_little_still_has_a_sentence(make_run):
    run = read_run(make_run(rows=[{"kind": "train", "step": 1, "loss": float("nan")}], env={}, config=""))
    assert sentence(summarize(run)) == "A model made 1 step."
    assert [tile.label for tile in tiles(summarize(run), run.config)] == ["Steps"]


def test_throughput_is_not_moved_by_a_slow_first_step(make_run):
    rows = [
        train_row(1, tokens_per_s=10.0),
        *(train_row(step, mfu=0.4, peak_memory_gib=31.25) for step in range(2, 10)),
    ]
    run = read_run(make_run(rows=rows))
    tile = next(tile for tile in tiles(summarize(run), run.config) if tile.label == "Throughput")
    assert (tile.value, tile.unit, tile.notes) == ("2.05", "k tokens/s", ("MFU 40.0 %", "31.2 GiB at most"))


def test_an_earlier_best_validation_loss_names_its_step_and_the_last(make_run):
    run = read_run(make_run(rows=[train_row(1), val_row(1, 2.0), val_row(2, 3.0)]))
    tile = next(tiles(summarize(run), run.config))
    assert (tile.value, tile.notes) == ("2.000", ("perplexity 7.39", "at step 1; last 3.000"))
