"""A loss that is not finite, or jumps up, in the middle of a run: what is written, and what the run does next."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint
from regpt.config import RunConfig
from regpt.errors import UserError
from regpt.parallel.mesh import launcher_rank
from regpt.runs import build
from regpt.runs.build import build_loader, open_corpus
from regpt.runs.pretrain import pretrain, resume
from regpt.train.trainer import StepResult

BAD = 4  # the batch that spoils, counted from 0: of update 5


@pytest.fixture(scope="module")
def config(shards) -> RunConfig:
    return tiny.change(tiny.run_config(shards), "train", on_non_finite="skip")


def bad_row(config: RunConfig, step: int = BAD, row: int = 2) -> torch.Tensor:
    return build_loader(config, open_corpus(config), tiny.ALONE).step(step, 1)[row].idx


@pytest.fixture
def spoiled(config, monkeypatch) -> Callable[..., None]:
    """`spoiled(rows, what)`: from now on the loss of a micro-batch that is one of `rows` is `what` times as large."""

    def spoil(*rows: torch.Tensor, what: float = math.nan) -> None:
        def wrap(model, good):
            return lambda batch: good(batch) * (what if any(batch.idx.equal(row) for row in rows) else 1.0)

        monkeypatch.setattr(build, "make_backend", tiny.wrapping(wrap))

    return spoil


def events(run: Path, name: str) -> list[dict]:
    return [row for row in tiny.rows_of(run, "event") if row["name"] == name]


def test_stop_names_the_step_and_the_documents_and_applies_nothing(config, spoiled, tmp_path: Path):
    spoiled(bad_row(config))
    with pytest.raises(UserError, match=r"^step 5: the loss is nan .* \(rank 0\), so the update was not applied"):
        pretrain(tiny.change(config, "train", on_non_finite="stop"), tmp_path / "run")
    assert [row["step"] for row in tiny.rows_of(tmp_path / "run", "train")] == [1, 2, 3, 4]
    (event,) = events(tmp_path / "run", "non_finite")
    assert (event["step"], event["at_step"], event["loss"], event["policy"]) == (4, 5, "nan", "stop")
    assert event["lr"] > 0
    assert event["grad_norm"] == "nan"
    assert (event["ranks"], event["repeats"], event["weights"]) == ([0], True, None)
    assert event["rows"] == [16, 19]  # four rows a step


def test_a_norm_that_overflows_is_no_fault_of_the_moment(config, spoiled, tmp_path: Path, capsys):
    """Loss and every gradient are finite; computed once more it is the same, so the hardware is not to be suspected."""
    spoiled(*(bad_row(config, row=row) for row in range(4)), what=1e36)
    with pytest.raises(UserError) as raised:
        pretrain(tiny.change(config, "train", on_non_finite="stop"), tmp_path / "run")
    (event,) = events(tmp_path / "run", "non_finite")
    assert math.isfinite(event["loss"])
    assert (event["grad_norm"], event["ranks"], event["repeats"], event["weights"]) == ("inf", [0], True, None)
    assert not {document["loss"] for document in event["documents"]} & {"nan", "inf"}
    said = str(raised.value)
    assert "set a lower --optim.lr or more --optim.warmup-steps" in said
    assert "hardware" not in said
    assert "--train.precision" not in said  # it is fp32 already
    assert "step 5: loss " in capsys.readouterr().out  # counted as in the error


@pytest.mark.parametrize(
    ("keys", "step", "found", "advice"),
    [
        (
            {"precision": "bf16"},
            4,
            {"repeats": True},
            "lower --optim.lr or more --optim.warmup-steps or --train.precis",
        ),
        (
            {"precision": "fp32"},
            4,
            {"repeats": False},
            "suspect the hardware, and continue from the last checkpoint with -",
        ),
        (
            {"precision": "bf16"},
            0,
            {"repeats": True},
            "skip, or, with --force or --fork-from, set --train.precision fp3",
        ),
        ({"precision": "fp32", "on_non_finite": "skip"}, 0, {}, "check the data and the model of --init-from"),
        ({"precision": "fp64"}, 0, {}, "continue from the last checkpoint with --train.on-non-finite skip"),
        (
            {"precision": "fp32", "on_non_finite": "rewind"},
            3,
            {},
            "with --force or --fork-from, set a lower --optim.lr",
        ),
    ],
)
def test_the_advice_is_what_was_not_done_already(keys, step: int, found, advice: str):
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(), train=tiny.replace(tiny.TRAIN, **keys))
    trainer.step = step
    said = str(trainer.stopped(StepResult(step + 1, 1.0, math.inf, 0.1, found=found)))
    assert advice in said
    for flag in (f"on-non-finite {trainer.config.on_non_finite}", f"precision {trainer.config.precision}"):
        assert flag not in said


def test_the_documents_of_the_event_are_those_of_the_batch(config, spoiled, shards, tmp_path: Path):
    spoiled(bad_row(config))
    assert pretrain(config, tmp_path / "run") == 0
    (event,) = events(tmp_path / "run", "non_finite")
    corpus = open_corpus(config)
    from regpt.data.stream import document_starts

    folder = corpus.folders[0]
    starts = document_starts(folder.path, folder.manifest, "train")
    stored = folder.stream("train", "sequential", 0)
    batch_rows = {
        16 + i: batch.idx[0].tolist() for i, batch in enumerate(build_loader(config, corpus, tiny.ALONE).step(BAD, 1))
    }
    assert event["n_documents"] >= len(event["documents"]) > 0
    for found in event["documents"]:
        begin = int(starts[found["document"]]) + found["offset"]
        text = corpus.tokenizer.decode(stored.tokens(begin, found["tokens"]).tolist())
        assert text.startswith(found["text"].removesuffix("…"))
        read = batch_rows[found["row"]]
        piece = stored.tokens(begin, found["tokens"]).tolist()
        assert any(read[i : i + len(piece) - 1] == piece[:-1] for i in range(len(read)))


def test_skip_makes_the_update_with_the_next_batch(config, spoiled, tmp_path: Path):
    spoiled(bad_row(config))
    assert pretrain(config, tmp_path / "run") == 0
    assert [row["step"] for row in tiny.rows_of(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6, 7, 8]
    state = load_checkpoint(checkpoint_folder(tmp_path / "run", 8)).state
    assert state.data.next_row == 4 * (8 + 1)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_resumed_run_leaves_the_same_batches_out(config, spoiled, policy: str, tmp_path: Path):
    spoiled(bad_row(config))
    config = tiny.change(config, "train", on_non_finite=policy)
    assert pretrain(config, tmp_path / "straight") == 0
    for step in (2, 4, 6):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "straight", run)
        for folder in checkpoints(run):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
        assert resume(run) == 0
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (checkpoint_folder(r, 8) / name for r in (run, tmp_path / "straight"))
            assert ours.read_bytes() == theirs.read_bytes()
        assert load_checkpoint(checkpoint_folder(run, 8)).state.data.next_row == 4 * (8 + 1)


def test_rewind_goes_back_to_the_last_checkpoint_and_on_after_the_bad_batch(config, spoiled, tmp_path: Path):
    spoiled(bad_row(config, step=5))  # update 6; the last checkpoint is of step 4
    run = tmp_path / "run"
    assert pretrain(tiny.change(config, "train", on_non_finite="rewind"), run) == 0
    assert [row["step"] for row in tiny.rows_of(run, "train")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    (event,) = events(run, "rewind")
    assert (event["checkpoint"], event["updates"], event["batches_left_out"]) == ("step-00000004", 1, 2)
    assert load_checkpoint(checkpoint_folder(run, 8)).state.data.next_row == 4 * (8 + 2)
    assert load_checkpoint(checkpoint_folder(run, 4)).state.data.next_row == 4 * (4 + 2)  # a crash forgets nothing


def test_rewind_takes_the_average_of_the_weights_back_too(config, spoiled, tmp_path: Path):
    spoiled(bad_row(config, step=5))
    run, again = tmp_path / "run", tmp_path / "again"
    config = tiny.change(config, "train", on_non_finite="rewind", ema_decay=0.9)
    assert pretrain(config, run) == 0
    assert load_checkpoint(checkpoint_folder(run, 8)).state.average_updates == 8
    shutil.copytree(run, again)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(again, later))
    assert resume(again) == 0
    ours, theirs = (checkpoint_folder(r, 8) / "ema.safetensors" for r in (run, again))
    assert ours.read_bytes() == theirs.read_bytes()


def test_rewind_without_a_checkpoint_says_what_to_do(config, spoiled, tmp_path: Path):
    spoiled(bad_row(config, step=1))
    with pytest.raises(UserError, match=r"no checkpoint to go back to; set a smaller checkpoint\.every_steps"):
        pretrain(tiny.change(config, "train", on_non_finite="rewind"), tmp_path / "run")


def test_too_many_in_a_row_stop_the_run(config, spoiled, tmp_path: Path):
    spoiled(*(bad_row(config, step=step) for step in (4, 5, 6, 7)))
    with pytest.raises(UserError, match=r"step 5: .*, after 3 more skipped batches.*was not applied"):
        pretrain(config, tmp_path / "run")
    assert len(events(tmp_path / "run", "non_finite")) == 4


@pytest.mark.parametrize(("policy", "batches"), [("record", 40), ("skip", 41)])
def test_a_spike_is_recorded_and_skipped_when_asked_for(config, spoiled, policy: str, batches: int, tmp_path: Path):
    config = tiny.change(config, "train", steps=40, on_spike=policy, micro_batch_rows=4)
    config = tiny.change(tiny.change(config, "eval", every_steps=0), "checkpoint", every_steps=0)
    config = tiny.change(config, "optim", lr=1e-4)
    bad = build_loader(config, open_corpus(config), tiny.ALONE).step(36)[0].idx
    spoiled(bad, what=9.0)
    assert pretrain(config, tmp_path / "run") == 0
    (event,) = events(tmp_path / "run", "spike")
    assert (event["at_step"], event["policy"]) == (37, policy)
    assert event["score"] > 7
    assert event["documents"]
    assert load_checkpoint(checkpoint_folder(tmp_path / "run", 40)).state.data.next_row == 4 * batches


def two_processes(config: RunConfig, run: Path) -> str:
    rank, row = launcher_rank(), bad_row(config, row=1)

    def wrap(model, good):
        return lambda batch: good(batch) * (math.nan if batch.idx.equal(row) else 1.0)

    build.make_backend = tiny.wrapping(wrap)  # in this process only
    try:
        pretrain(config, run)
    except UserError as error:
        return f"{rank}: {error}"
    return f"{rank}: finished"


def test_the_process_that_has_the_bad_batch_is_named_by_all(config, tmp_path: Path):
    config = tiny.change(config, "train", on_non_finite="stop")
    said = tiny.in_processes(2, two_processes, config, tmp_path / "run")
    assert all("step 5: the loss is nan" in text and "(rank 1)" in text for text in said)
    (event,) = events(tmp_path / "run", "non_finite")
    assert event["ranks"] == [1]
