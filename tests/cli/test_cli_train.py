"""`regpt train` as a user meets it: a whole run, its folder, and every mistake in one sentence."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regpt.__main__ import main
from regpt.runs.folder import read_run_config

TINY = "gpt2-tiny"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_flags: list[str]) -> Path:
    run = tmp_path_factory.mktemp("runs") / "done"
    assert main(["train", TINY, "--out", str(run), *tiny_flags]) == 0
    return run


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def one_sentence(err: str) -> bool:
    return err.startswith("regpt: ") and err.count("\n") == 1 and "Traceback" not in err


def test_a_run_leaves_the_documented_folder(finished_run: Path):
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.toml", "env.json", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= names
    train, val = rows(finished_run, "train"), rows(finished_run, "val")
    assert [row["step"] for row in train] == [1, 2, 3]
    assert [row["tokens"] for row in train] == [64, 128, 192]
    assert [row["step"] for row in val] == [0, 3]
    assert {"loss", "lr", "grad_norm", "dt_ms", "tokens_per_s", "mfu", "flops", "peak_memory_gib", "time"} <= set(
        train[0]
    )
    checkpoint = finished_run / "checkpoints" / "step-00000003"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 3
    env = json.loads((finished_run / "env.json").read_text())
    assert env["torch"] == torch.__version__
    assert len(env["data"]["manifest_sha256"]) == 64
    assert env["peak"]["flops"] > 0
    if not torch.cuda.is_available():
        assert "measured here: a fp32 product" in env["peak"]["how"]


def test_the_stored_configuration_repeats_the_run(regpt, finished_run: Path, tmp_path: Path):
    code, _, _ = regpt("train", finished_run / "config.toml", "--out", tmp_path / "again")
    assert code == 0
    assert [r["loss"] for r in rows(tmp_path / "again", "train")] == [r["loss"] for r in rows(finished_run, "train")]


def test_a_finished_run_serves_sample_eval_export_and_report(regpt, finished_run: Path, tmp_path: Path):
    code, out, _ = regpt("sample", finished_run, "--prompt", "the", "-n", "2", "--max-new-tokens", "3", "--json")
    assert code == 0
    assert len(json.loads(out)["samples"]) == 2
    code, out, _ = regpt("eval", finished_run, "--tasks", "val", "--json", "-")
    assert code == 0
    val = rows(finished_run, "val")[-1]
    assert json.loads(out)["tasks"]["val"]["loss"] == pytest.approx(val["loss"], rel=1e-5)
    assert regpt("export", finished_run, "--format", "hf", "--out", tmp_path / "hf")[0] == 0
    assert regpt("report", finished_run, "--out", tmp_path / "report.html")[0] == 0


def test_a_run_starts_from_the_weights_of_another(regpt, finished_run: Path, tiny_flags, tmp_path: Path):
    code, _, _ = regpt("train", TINY, "--out", tmp_path / "next", *tiny_flags, "--init-from", finished_run)
    assert code == 0
    before, after = rows(finished_run, "val")[-1], rows(tmp_path / "next", "val")[0]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--train.step", "5"], 2, ["--train.step", "--train.steps"]),
        (["--train.steps", "many"], 2, ["--train.steps", "many"]),
        (["--train.compile", "perhaps"], 2, ["--train.compile", "perhaps"]),
        (["--train.precision", "bf32"], 2, ["bf32", "bf16"]),
        (["--train.precision", "fp8", "--data.seq-len", "8"], 2, ["data.seq_len is 8", "set it to 16", "to bf16"]),
        (["--train.precision", "fp8", "--model.n-embd", "24"], 2, ["model.n_embd is 24", "set it to 16"]),
        (["--train.steps", "0"], 2, ["train.steps is 0", "must be at least 1"]),
        (["--data", "/no/such/folder"], 1, ["/no/such/folder", "does not exist", "regpt data prepare"]),
        (["--data", ""], 2, ["--data is empty", "leave the flag out"]),
        (["--data.tokenizer", "gpt2"], 1, ["made with the tokenizer 'bpe-300", "asks for 'gpt2'"]),
        (["--model.vocab-size", "301"], 1, ["vocabulary of 300", "--model.vocab-size 300"]),
        (["--data.seq-len", "32"], 2, ["data.seq_len 32 is longer than model.max_seq_len 16"]),
        (["--train.batch-tokens", "80"], 2, ["80", "64", "96"]),
        (["--train.micro-batch-rows", "3"], 2, ["train.micro_batch_rows", "48", "96"]),
        (["--model.n-embd", "15"], 2, ["model.n_embd = 15 is not divisible by model.n_head = 2"]),
        (["--train.batch-tokens", "1048576"], 1, ["1,048,576", "tokens"]),
        (["--nproc", "8", "--train.micro-batch-rows", "1"], 2, ["8 processes", "4 rows"]),
        (["--nproc", "0"], 2, ["--nproc is 0", "at least 1"]),
        (["--train.device", "cuda"], 2, ["'cuda' is not available", "cpu"]),
        (["--init-from", "/no/such/model"], 2, ["/no/such/model"]),
        (["--optim.decay-steps", "1"], 2, ["optim.decay_steps is 1", "warmup takes 1"]),
        (["--sample.prompt", "the cat sat on the mat and the dog ran to the tree"], 1, ["tokens", "16"]),
        (["--sample.seed", "-1"], 2, ["sample.seed", "-1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(regpt, tiny_flags, tmp_path: Path, flags, code, parts):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    tiny_flags = tiny_flags[2:] if "--data" in flags else tiny_flags
    got, _, err = regpt("train", TINY, "--out", tmp_path / "run", *tiny_flags, *flags)
    assert got == code, err
    assert one_sentence(err), err
    for part in parts:
        assert part in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[train]\nsteps = "12"', ["train.steps is '12'", "integer"]),
        ("[train]\nsteps = 12.0", ["train.steps is 12.0", "integer"]),
        ("[train]\nstep = 12", ["train.step", "did you mean 'steps'"]),
        ("[trian]\nsteps = 12", ["trian", "did you mean 'train'"]),
        ("[train\n", ["not valid TOML"]),
        ('recipe = "gpt2-1234m"', ["gpt2-1234m", "did you mean 'gpt2-124m'"]),
        ("train = 3", ["train is 3"]),
    ],
)
def test_a_wrong_file_is_refused_by_key(regpt, tmp_path: Path, text: str, parts: list[str]):
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    code, _, err = regpt("train", tmp_path / "mine.toml", "--data", "x", "--out", tmp_path / "run")
    assert code == 2
    assert one_sentence(err), err
    for part in parts:
        assert part in err


def test_an_unknown_recipe_names_the_nearest(regpt, tmp_path: Path):
    code, _, err = regpt("train", "gpt2-125m", "--data", "x", "--out", tmp_path / "run")
    assert code == 2
    assert "'gpt2-125m'" in err
    assert "did you mean 'gpt2-124m'" in err or "did you mean 'gpt3-125m'" in err


@pytest.mark.parametrize("order", ["recipe first", "recipe last"])
def test_flags_are_read_over_the_values_of_the_recipe(regpt, tiny_flags, tmp_path: Path, order: str):
    out = [
        "--out",
        tmp_path / "run",
        *tiny_flags,
        "--model.n-embd",
        "20",
        "--model.n-head=4",
    ]  # 20 is no multiple of 12
    code, _, err = regpt("train", *([TINY, *out] if order == "recipe first" else [*out, TINY]))
    assert code == 0, err
    config = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    assert "n_embd = 20" in config
    assert "beta2 = 0.99" in config  # the recipe's, not the default


def test_a_width_that_fits_the_recipes_heads_needs_no_other_flag(regpt, corpus: Path, tmp_path: Path):
    code, _, err = regpt("train", TINY, "--data", corpus, "--out", tmp_path / "run", "--model.n-embd", "64")
    assert code == 2 or code == 1
    assert "n_head" not in err  # stopped by the size of the data, not by the default's twelve heads


def test_the_vocabulary_is_that_of_the_data_unless_a_file_or_a_flag_gives_one(regpt, tiny_flags, tmp_path: Path):
    mine = tmp_path / "mine.toml"
    mine.write_text('recipe = "gpt2-tiny"\n[model]\nvocab_size = 301\n', encoding="utf-8")
    code, _, err = regpt("train", mine, "--out", tmp_path / "run", *tiny_flags)
    assert (code, "the model has 301; set --model.vocab-size 300, leave it out" in err) == (1, True)
    mine.write_text("[model]\nn_layer = 1\n", encoding="utf-8")  # no recipe: that file's own default
    assert regpt("train", mine, "--out", tmp_path / "run", *tiny_flags, "--train.compile", "false")[0] == 0
    assert read_run_config(tmp_path / "run").model.vocab_size == 300


def test_a_file_of_ones_own_needs_no_micro_batch_and_a_bad_one_is_refused(regpt, corpus: Path, tmp_path: Path):
    mine = tmp_path / "mine.toml"
    text = """
    model = {n_layer = 1, n_head = 2, n_embd = 16, max_seq_len = 16}
    data = {seq_len = 16}
    train = {steps = 2, batch_tokens = 48, compile = false ROWS}
    optim = {warmup_steps = 1}
    sample = {prompt = "the", max_new_tokens = 2}
    """
    mine.write_text(text.replace("ROWS", ""), encoding="utf-8")
    code, _, err = regpt("train", mine, "--data", corpus, "--out", tmp_path / "run")
    assert code == 0, err
    assert read_run_config(tmp_path / "run").train.micro_batch_rows in (1, 3)
    mine.write_text(text.replace("ROWS", ", micro_batch_rows = 2"), encoding="utf-8")
    code, _, err = regpt("train", mine, "--data", corpus, "--out", tmp_path / "run2")
    assert (code, "train.batch_tokens 48 is not a multiple of 32" in err) == (2, True)


@pytest.mark.skipif(os.name != "posix", reason="torch quotes paths on Windows")
def test_a_temporary_folder_that_the_compiler_cannot_use_is_one_sentence(
    regpt, tiny_flags, tmp_path: Path, monkeypatch
):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b"))
    flags = ["--out", tmp_path / "run", *tiny_flags, "--train.compile", "true", "--train.device", "cpu"]
    code, _, err = regpt("train", TINY, *flags)
    assert code == 1
    assert "torch.compile cannot use the temporary folder" in err
    assert one_sentence(err.splitlines(keepends=True)[-1])


def test_an_unknown_command_names_the_nearest(regpt):
    code, _, err = regpt("trian")
    assert code == 2
    assert "did you mean 'train'" in err


def test_a_truncated_shard_is_named(regpt, corpus: Path, tiny_flags, tmp_path: Path):
    broken = tmp_path / "shards"
    shutil.copytree(corpus, broken)
    shard = broken / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    code, _, err = regpt("train", TINY, "--out", tmp_path / "run", *tiny_flags[2:], "--data", broken)
    assert code == 1
    assert "train-00000.bin" in err
    assert one_sentence(err)


def test_a_changed_shard_is_found_by_verify(regpt, corpus: Path, tmp_path: Path):
    broken = tmp_path / "shards"
    shutil.copytree(corpus, broken)
    shard = broken / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    code, out, err = regpt("data", "verify", broken)
    assert code == 1
    assert "train-00000.bin" in out + err


def test_a_folder_that_holds_a_run_is_refused_and_untouched(regpt, finished_run: Path, tiny_flags):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    code, _, err = regpt("train", TINY, "--out", finished_run, *tiny_flags)
    assert code == 1
    assert "--resume" in err
    assert one_sentence(err)
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


def test_resume_refuses_a_model_of_another_shape(regpt, finished_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(config.replace("n_layer = 1", "n_layer = 2"), encoding="utf-8")
    code, _, err = regpt("train", "--resume", run)
    assert code == 2
    assert "another shape: model.n_layer 1 → 2" in err
    assert one_sentence(err)


def test_resume_of_nothing_is_one_sentence(regpt, tmp_path: Path):
    code, _, err = regpt("train", "--resume", tmp_path / "none")
    assert code == 1
    assert "does not exist" in err
    assert regpt("train", TINY, "--resume", tmp_path)[0] == 2


def test_an_unexpected_error_is_one_line_and_its_traceback_a_file(regpt, monkeypatch):
    def broken(args: list[str]) -> int:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("regpt.cli.report.main", broken)
    code, _, err = regpt("report", "x")
    assert code == 1
    assert err.startswith("regpt: RuntimeError: first line; traceback in ")
    log = Path(err.partition("traceback in ")[2].strip())
    assert "second line" in log.read_text(encoding="utf-8")
    log.unlink()
    with pytest.raises(RuntimeError):
        regpt("report", "x", "--debug")


def test_a_broken_pipe_that_is_not_the_output_is_said(regpt, monkeypatch):
    def broken(args: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("regpt.cli.report.main", broken)
    code, _, err = regpt("report", "x")
    assert code == 1
    assert err.startswith("regpt: BrokenPipeError")
    Path(err.partition("traceback in ")[2].strip()).unlink()


@pytest.mark.skipif(not hasattr(select, "poll"), reason="only poll tells of a pipe without a reader")
def test_output_without_a_reader_is_no_error(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "regpt", "--help"]
    with os.fdopen(write, "wb") as closed:
        found = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (1, b"")
    with open(tmp_path / "out", "wb") as file:
        assert subprocess.run(command, stdout=file, stderr=subprocess.PIPE, timeout=60, check=False).stderr == b""


def test_a_gpu_that_failed_is_told_in_one_line_and_nothing_is_freed_afterwards():
    script = (
        "import atexit, os, sys, torch, regpt.__main__ as main\n"
        "class Tensor:\n"
        "    def __del__(self): os.abort()  # as torch's that lie on a GPU which has failed\n"
        "def failing(args):\n"
        "    tensor = Tensor()\n"
        "    raise torch.AcceleratorError('CUDA error: unspecified launch failure\\nmore')\n"
        "atexit.register(os.abort)\n"
        "main.command_of = failing\n"
        "sys.argv = ['regpt', 'train', 'gpt2-tiny']\n"
        "try: sys.exit(main.main())\n"
        "finally: print('noted')\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout) == (1, "noted\n")
    said = found.stderr.strip()
    assert said.startswith("regpt: AcceleratorError: CUDA error: unspecified launch failure; traceback in ")
    assert len(said.splitlines()) == 1
    Path(said.split(" in ")[-1]).unlink()
