"""TensorBoard and Weights & Biases get what metrics.jsonl gets, and nothing leaves the machine unasked."""

import sys
from contextlib import ExitStack

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regpt.errors import UserError
from regpt.runs import items, trackers
from regpt.runs.pretrain import check, pretrain
from regpt.runs.trackers import TensorBoard, WandB, check_trackers, scalars, texts
from regpt.train.config import LogConfig
from tiny import change, run_config, write_shards

ROWS = [
    {"kind": "train", "step": 1, "loss": 4.0, "mfu": None, "tokens": 64, "time": 1.0},
    {"kind": "val", "step": 1, "loss": 3.5, "bpb": float("nan")},
    {"kind": "val", "step": 1, "loss": 3.0, "source": "books"},
    {"kind": "eval", "step": 1, "task": "core/piqa", "metric": "acc", "value": 0.5},
    {"kind": "updates", "step": 1, "ratio": 1e-3, "ratios": {"wte": 2e-3, "wpe": None}},
    {"kind": "event", "step": 1, "name": "resume", "world_size": 2},
]


def test_numbers_are_grouped_by_what_they_measure():
    assert [scalars(row) for row in ROWS] == [
        {"train/loss": 4.0},
        {"val/loss": 3.5},
        {"val/books/loss": 3.0},
        {"eval/core/piqa/acc": 0.5},
        {"updates/all": 1e-3, "updates/wte": 2e-3},
        {},
    ]


def test_samples_are_texts_with_their_prompts():
    assert texts({"step": 1, "prompt": "a", "texts": ["ab", "ac"]}) == [("a", "ab"), ("a", "ac")]
    assert texts(ROWS[0]) == []


def recorded(folder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_a_run_writes_tensorboard_s_files_beside_its_own(tmp_path):
    config = change(run_config(write_shards(tmp_path / "data")), "log", tensorboard=True)
    assert pretrain(config, tmp_path / "run") == 0
    found = recorded(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in found["val/loss"]] == [0, 3, 6, 8]
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_what_lies_beyond_the_checkpoint_is_discarded_by_a_resumed_run(tmp_path):
    for first, steps, loss in ((0, 5, 4.0), (3, 6, 2.0)):  # killed after step 5, resumed from 3
        with ExitStack() as stack:
            board = TensorBoard(tmp_path, first, stack)
            for step in range(first + 1, steps + 1):
                board.write({"kind": "train", "step": step, "loss": loss, "time": float(step)})
    assert recorded(tmp_path)["train/loss"] == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 2.0), (5, 2.0), (6, 2.0)]


class Recorder:
    """Stands in for the package: what a run was started with, and what it was sent."""

    def __init__(self):
        self.started, self.sent, self.finished = [], [], 0
        self.Settings = dict
        self.Table = lambda columns, data: (columns, data)

    def init(self, **given):
        self.started.append(given)
        return self

    def define_metric(self, *names, **given):
        pass

    def log(self, values):
        self.sent.append(values)

    def finish(self):
        self.finished += 1

    def teardown(self):
        assert self.finished


def test_weights_and_biases_get_rows_and_samples_of_one_run(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    (tmp_path / "env.json").write_text("{}", encoding="utf-8")
    for _ in range(2):  # the second time as a resumed run
        with ExitStack() as stack:
            tracker = WandB(LogConfig(wandb="offline", wandb_project="p"), tmp_path, {"train": {"steps": 1}}, stack)
            tracker.write(ROWS[0])
            tracker.write(ROWS[-1])
            tracker.write({"step": 1, "prompt": "a", "texts": ["ab"]})
    first, second = recorder.started
    assert first["id"] == second["id"]
    assert (first["mode"], first["project"], first["dir"]) == ("offline", "p", str(tmp_path))
    assert recorder.sent[:2] == [
        {"train/loss": 4.0, "step": 1},
        {"samples": (["prompt", "text"], [["a", "ab"]]), "step": 1},
    ]
    assert recorder.finished == 2


@pytest.mark.slow
def test_the_real_package_writes_offline(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):  # nothing may be reached
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    config = change(run_config(write_shards(tmp_path / "data")), "log", wandb="offline")
    assert pretrain(config, tmp_path / "run") == 0
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000
    assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize("given", [{"tensorboard": True}, {"wandb": "offline"}])
def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch, given):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = change(run_config(write_shards(tmp_path / "data")), "log", **given)
    with pytest.raises(UserError, match=r"pip install 'regpt\[(tensorboard|wandb)\]'"):
        check(config, tmp_path / "run")
    check_trackers(LogConfig())


class Failing:
    """A tracker whose disk is full."""

    def __init__(self, when: str, stack: ExitStack):
        self.when, self.rows = when, 0
        stack.callback(self.do, "close")
        self.do("open")

    def do(self, what: str) -> None:
        if what == self.when:
            raise OSError(28, "No space left on device")

    def write(self, row: dict) -> None:
        self.rows += 1
        self.do("write")


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_copy_that_fails_is_said_once_and_ends_no_run(tmp_path, shards, monkeypatch, capsys, when):
    monkeypatch.setattr(trackers, "TensorBoard", lambda folder, step, stack: Failing(when, stack))
    config = change(run_config(shards), "log", tensorboard=True)
    assert pretrain(config, tmp_path / "run") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line]
    assert said == [
        "the copy of the metrics for TensorBoard cannot be written ([Errno 28] No space left on device); the run "
        "continues without it"
    ]


def test_a_full_disk_under_the_items_of_an_evaluation_ends_no_run(tmp_path, shards, monkeypatch, capsys):
    run = tmp_path / "run"
    real = items.write_items

    def write(folder, *args):
        if args[-1] == 3:
            raise OSError(28, "No space left on device")
        return real(folder, *args)

    monkeypatch.setattr(items, "write_items", write)
    assert pretrain(run_config(shards), run) == 0
    assert "the items of val after step 3 are not kept: cannot write" in capsys.readouterr().out
    assert [path.name for path in (run / "evals").iterdir()] == ["val-step-00000008.jsonl"]
