import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import regpt
import tiny
from regpt.cli.eval import bar, main
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.data.manifest import Manifest, Shard
from regpt.errors import UsageError, UserError
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.text.bpe import BPETokenizer, train_bpe

TOKENS = 64  # rows of 8: seven full ones, and seven tokens that are left over
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=257, max_seq_len=16)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["hello hello"], 257)


def write_data(folder: Path, tokenizer: BPETokenizer, tokens: np.ndarray, of: str = "") -> Path:
    """A data folder with only a validation split, of one document, by a tokenizer of hash `of`."""
    folder.mkdir()
    shard = Shard("val-00000.bin", "val", len(tokens), 1, "", "")
    tokens.astype("<u2").tofile(folder / shard.file)
    np.zeros(1, "<i8").tofile(folder / shard.idx_file)
    manifest = Manifest(tokenizer.name, of or tokenizer.sha256, 257, tokenizer.eot, "uint16", (shard,))
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, 257, TOKENS)
    drawn[[0, 20]] = tokenizer.eot
    return drawn


@pytest.fixture(scope="module")
def model() -> Transformer:
    return initialize(make_model(MODEL), seed=1).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, model, tokens) -> Path:
    """A run that trained on rows of 8 tokens, after three steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = write_data(folder.parent / "data", tokenizer, tokens)
    step = folder / "checkpoints" / "step-00000003"
    tiny.save_model(step, model, tokenizer)
    config = RunConfig(model=MODEL, data=DataConfig(path=str(data), seq_len=8))
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return folder


@torch.no_grad()
def by_hand(model: Transformer, tokens: np.ndarray, eot: int, n_rows: int, seq_len: int) -> dict[str, float]:
    """Log-softmax in NumPy, in float64, row by row."""
    nats, n_bytes = 0.0, 0
    for row in range(n_rows):
        text = tokens[row * seq_len : row * seq_len + seq_len + 1]
        logits = model(torch.from_numpy(text[None, :-1].astype(np.int64)))[0].double().numpy()
        for scores, target in zip(logits, text[1:]):
            nats += np.log(np.exp(scores).sum()) - scores[target]
            n_bytes += target != eot  # every other token of this vocabulary is one byte
    n = n_rows * seq_len
    return {"loss": nats / n, "perplexity": math.exp(nats / n), "bpb": nats / math.log(2) / n_bytes, "tokens": n}


Eval = Callable[..., dict]


@pytest.fixture
def evaluate(capsys) -> Eval:
    def call(*args: object) -> dict:
        assert main([*map(str, args), "--device", "cpu", "--json", "-"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_run_is_evaluated_on_its_own_data(evaluate, run, model, tokens, tokenizer):
    report = evaluate(run)
    val = report["tasks"]["val"]
    expected = by_hand(model, tokens, tokenizer.eot, n_rows=7, seq_len=8)
    assert {key: val[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (report["step"], val["seq_len"], val["data"]) == (3, 8, str(run.parent / "data"))


def test_a_checkpoint_inside_a_run_is_evaluated_like_the_run(evaluate, run):
    inside = evaluate(run / "checkpoints" / "step-00000003")
    assert inside["tasks"] == evaluate(run)["tasks"]


def test_a_checkpoint_elsewhere_uses_the_length_of_the_model(evaluate, run, tmp_path, model, tokens, tokenizer):
    step = tmp_path / "copy"
    tiny.save_model(step, model, tokenizer)
    val = evaluate(step, "--data", run.parent / "data")["tasks"]["val"]
    expected = by_hand(model, tokens, tokenizer.eot, n_rows=3, seq_len=16)
    assert {key: val[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UsageError, match=r"names no run that knows its data; give the folder .* --data"):
        main([str(step)])


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_the_number_of_rows_computed_at_once_does_not_matter(evaluate, run, batch_rows):
    args = (run, "--precision", "fp64")
    whole, parts = (evaluate(*args, *more)["tasks"]["val"] for more in ((), ("--batch-rows", batch_rows)))
    assert parts.pop("data") == whole.pop("data")
    errors = ("stderr", "bpb_stderr")  # these take a batch as their unit
    parts, whole = ({key: x for key, x in val.items() if key not in errors} for val in (parts, whole))
    assert parts == pytest.approx(whole, rel=1e-13)


def test_val_tokens_limits_what_is_read(evaluate, run, model, tokens, tokenizer):
    val = evaluate(run, "--val-tokens", 30)["tasks"]["val"]
    expected = by_hand(model, tokens, tokenizer.eot, n_rows=3, seq_len=8)
    assert {key: val[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_bf16_is_close_to_fp32(evaluate, run):
    before = torch.get_float32_matmul_precision()
    try:
        bf16 = evaluate(run, "--precision", "bf16")["tasks"]["val"]["loss"]
        fp32 = evaluate(run)["tasks"]["val"]["loss"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=1e-3)


def test_the_table_shows_what_the_file_holds(capsys, run, tmp_path):
    file = tmp_path / "eval.json"
    assert main([str(run), "--device", "cpu", "--json", str(file)]) == 0
    val = json.loads(file.read_text(encoding="utf-8"))["tasks"]["val"]
    shown = capsys.readouterr()
    for part in (
        f"{val['loss']:.4f}",
        f"{val['bpb']:.4f}",
        f"{val['perplexity']:.2f}",
        "7 rows of 8 tokens, of 64 tokens",
    ):
        assert part in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def refused(kind: type[UserError], said: str, *args: object) -> None:
    with pytest.raises(kind, match=said) as error:
        main([*map(str, args), "--device", "cpu"])
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UsageError) == (kind is UsageError)


def test_an_unknown_task_names_the_nearest(run):
    refused(UsageError, "task 'vla' is unknown .did you mean 'val'.*; choose from val", run, "--tasks", "val,vla")


def test_data_of_another_tokenizer_is_refused(run, tmp_path, tokenizer, tokens):
    other = write_data(tmp_path / "other", tokenizer, tokens, of="f" * 64)
    refused(UserError, "made with the tokenizer .* .ffffffffffff….* prepare the text again", run, "--data", other)


def test_what_cannot_be_evaluated_is_one_sentence(run, tmp_path, tokenizer, tokens):
    refused(UserError, "does not exist", run, "--data", tmp_path / "nowhere")
    refused(UsageError, "model 'nowhere' does not exist", "nowhere")
    refused(UsageError, "'gpt2' names no run that knows its data; give the folder", "gpt2")
    small = write_data(tmp_path / "small", tokenizer, tokens[:8])
    refused(UserError, "the split has 8 tokens and one row needs 9", run, "--data", small)
    refused(UsageError, "seq-len is 17, must be between 1 and the model's 16", run, "--seq-len", 17)
    refused(UsageError, "seq-len is 0", run, "--seq-len", 0)
    refused(UsageError, "nproc is 0, must be at least 1", run, "--nproc", 0)
    refused(UsageError, "batch-rows is 0", run, "--batch-rows", 0)
    refused(UsageError, "val-tokens is 7, must be at least one row of 8", run, "--val-tokens", 7)
    refused(UsageError, "val-tokens is -1", run, "--val-tokens", -1)
    refused(UserError, "the folder does not exist; make it first", run, "--json", tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_what_to_try(run, monkeypatch, error):
    def exhausted(*args: object) -> None:
        raise error

    monkeypatch.setattr("regpt.runs.validation.batch_losses", exhausted)
    refused(UserError, "out of memory with --batch-rows 8; try --batch-rows 4", run)
    refused(UserError, "try a shorter --seq-len", run, "--batch-rows", 1)


def test_damaged_weights_give_no_number(run, tmp_path, tokenizer):
    model = initialize(make_model(MODEL), seed=1)
    model.wpe.weight.data[3] = math.nan
    folder = tiny.save_model(tmp_path / "nan", model, tokenizer)
    refused(
        UserError,
        r"model\.safetensors' holds numbers in 'wpe\.weight' that are not finite",
        folder,
        "--data",
        run.parent / "data",
    )


# ---- other tasks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mc") / "q.jsonl"
    rows = [{"ctx": f"{i} is", "endings": [f"{(i * k) % 7}" for k in range(1, 5)], "label": i % 4} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tasks_are_reported_with_errors_and_outcomes(evaluate, run, questions):
    report = evaluate(run, "--tasks", f"val,hellaswag:{questions},mc:{questions}")
    assert list(report["tasks"]) == ["val", "hellaswag", f"mc:{questions}"]
    found = report["tasks"]["hellaswag"]
    assert (found["n"], found["n_items"], found["baseline"]) == (40, 40, 0.25)
    p = found["metrics"]["acc"]["value"]
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 39))
    assert found["metrics"] == report["tasks"][f"mc:{questions}"]["metrics"]  # these endings get a space either way
    assert found["items_sha256"] == report["tasks"][f"mc:{questions}"]["items_sha256"]


def test_a_terminal_shows_how_far_it_is(run, questions, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with bar("mine") as progress:  # drawn before the number of items is known
        progress(7, 1000)
    assert "7 of 1,000" in capsys.readouterr().err
    assert main([str(run), "--tasks", f"val,mc:{questions}", "--device", "cpu"]) == 0
    assert "40 of 40" in capsys.readouterr().err


def test_a_part_of_a_task_is_shown_as_such(run, questions, capsys):
    assert main([str(run), "--tasks", f"mc:{questions}", "--device", "cpu", "--max-items", "10"]) == 0
    assert "10 of 40" in capsys.readouterr().out


def test_items_longer_than_the_model_are_counted_and_said(evaluate, run, tmp_path, capsys):
    rows = [{"ctx": "x" * n, "endings": ["ab", "c"], "label": 0} for n in (1, 14, 15, 99)]  # " ab": three tokens
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = evaluate(run, "--tasks", f"mc:{path}")
    assert report["tasks"][f"mc:{path}"]["cut"] == 2  # the last token of sixteen and one is only predicted
    assert main([str(run), "--device", "cpu", "--tasks", f"mc:{path}"]) == 0
    said = capsys.readouterr().out
    assert f"2 of 4 items of mc:{path} are longer than the model's 16 tokens: truncated" in said


@pytest.mark.parametrize("flag", [("--items", "DIR"), ("--max-items", "3")])
def test_flags_of_items_are_refused_where_no_task_has_any(run, flag):
    refused(UsageError, f"{flag[0]} would change nothing with --tasks val", run, *flag)


def test_limits_below_zero_are_refused(run, questions):
    refused(UsageError, "--max-items is -1, must be 0 or more", run, "--tasks", f"mc:{questions}", "--max-items", -1)


def test_files_are_read_before_anything_is_computed(run, tmp_path):
    refused(UserError, "does not exist", run, "--tasks", f"val,mc:{tmp_path / 'no.jsonl'}")


def test_several_processes_find_the_same(evaluate, run, questions, tmp_path):
    args = ("--tasks", f"val,hellaswag:{questions}", "--precision", "fp64")
    alone = evaluate(run, *args, "--items", tmp_path / "one")["tasks"]
    file = tmp_path / "two.json"
    more = ("--nproc", "2", "--json", str(file), "--items", str(tmp_path / "two"))
    assert main([str(run), *args, "--device", "cpu", *more]) == 0
    together = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    assert together["val"]["loss"] == pytest.approx(alone["val"]["loss"], rel=1e-13)
    one, two = ((tmp_path / name / "hellaswag-step-00000003.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert one.count("\n") == 40
    assert json.loads(one.splitlines()[0]).keys() == {"item", "acc", "acc_norm"}


def test_items_of_earlier_steps_give_way(run, questions, tmp_path):
    for step in (1, 5):
        (tmp_path / f"hellaswag-step-{step:08d}.jsonl").write_text("", encoding="utf-8")
    args = ["--tasks", f"hellaswag:{questions}", "--device", "cpu", "--items", str(tmp_path)]
    assert main([str(run), *args]) == 0
    assert sorted(path.name[15:23] for path in tmp_path.iterdir()) == ["00000003", "00000005"]


@pytest.mark.parametrize(
    "flag", [("--val-tokens", "64"), ("--seq-len", "8"), ("--batch-rows", "4"), ("--data", "shards")]
)
def test_flags_of_val_are_refused_where_it_is_not_evaluated(run, questions, flag):
    said = f"{flag[0]} would change nothing without the task val"
    refused(UsageError, said, run, "--tasks", f"mc:{questions}", *flag)
    name = flag[0].removeprefix("--").replace("-", "_")
    value = flag[1] if name == "data" else int(flag[1])
    with pytest.raises(UsageError, match=f"{name} would change nothing without the task val"):  # as Python spells it
        regpt.evaluate(str(run), f"mc:{questions}", **{name: value})
    with pytest.raises(UsageError, match="max_items would change nothing with tasks val"):
        regpt.evaluate(str(run), "val", max_items=3)


def test_what_is_no_model_is_said_to_be_none_before_its_data_are_asked_for(tmp_path):
    (tmp_path / "file.toml").touch()
    for place in (tmp_path, tmp_path / "file.toml"):
        refused(UsageError, "holds no model; a model is", place)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no full device")
def test_numbers_are_printed_where_their_file_cannot_be_written(capsys, run):
    with pytest.raises(UserError, match=r"No space left on device.*another file for --json"):
        main([str(run), "--device", "cpu", "--json", "/dev/full"])
    assert capsys.readouterr().out.startswith("task")
