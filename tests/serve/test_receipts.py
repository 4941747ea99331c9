"""Receipts: texts of the server and of `regpt sample`, written again by `regpt verify-receipt`."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import torch
from serving import CONFIG, MODEL, TEMPLATE, TOKENIZER, Serving, loaded, serving

import tiny
from regpt.__main__ import main
from regpt.checkpoint.open import open_model
from regpt.engine import receipt as receipts
from regpt.engine.receipt import read_receipt, reproduce
from regpt.hf.export import export_hf
from regpt.text.folder import CHAT

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("receipts") / "small" / "checkpoints" / "step-00000003"
    return tiny.save_model(folder, MODEL, TOKENIZER)


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Serving]:
    with serving([loaded(opened=replace(open_model(str(checkpoint)), companions={CHAT: TEMPLATE}))]) as running:
        yield running


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Path):
    """Exit code, output and error of `regpt verify-receipt` with the served model."""

    def verified(path: Path, *args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["verify-receipt", str(path), *map(str, args or ("--model", checkpoint))])
        return code, *capsys.readouterr()

    return verified


def last_event(answer: httpx.Response) -> dict:
    lines = [line.partition("data: ")[2] for line in answer.text.split("\n") if "data: {" in line]
    return json.loads(lines[-1])


ASKED = {
    "completions": {"prompt": ["Zürich", "abc"], "max_tokens": 30, "stop": ["e", "zz"], "n": 2, "logprobs": 1},
    "chat/completions": {"messages": [{"role": "user", "content": "日本"}], "max_tokens": 25, "frequency_penalty": 0.5},
    "responses": {"input": "Hi", "max_output_tokens": 20, "temperature": 2},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKED)
def test_an_answer_of_the_server_is_written_again_from_its_receipt(served, run, tmp_path, path, stream):
    asked = ASKED[path] | {"receipt": True, "seed": 5, "top_p": 0.9, "logit_bias": {"65": 2}}
    answer = served.post(path, stream=stream, **asked)
    found = last_event(answer) if stream else answer.json()
    file = tmp_path / "answer.json"
    file.write_text(answer.text if stream else json.dumps(found))  # what curl wrote
    texts = read_receipt(file).texts
    whole = served.post(path, **asked | {"receipt": False}).json()
    usage = whole["usage"]
    assert sum(len(one.tokens) for one in texts) == usage.get("completion_tokens", usage.get("output_tokens"))
    assert "receipt" not in whole["regpt"]
    code, out, _ = run(file)
    assert code == 0
    assert f"{len(texts)} text{'s' if len(texts) > 1 else ''}, " in out.splitlines()[-1]
    if path == "completions":
        written = [choice["text"] for choice in whole["choices"]]
        assert out == "".join(f"> {prompt}{text}\n" for prompt, text in zip(["Zürich"] * 2 + ["abc"] * 2, written)) + (
            out.splitlines()[-1] + "\n"
        )


def test_a_receipt_names_the_hashes_that_others_can_compute(served, checkpoint):
    chat = served.post("chat/completions", **ASKED["chat/completions"], receipt=True).json()["regpt"]["receipt"][
        "model"
    ]
    assert chat["weights_sha256"] == sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert chat["tokenizer_sha256"] == TOKENIZER.sha256
    assert chat["template_sha256"] == sha256(TEMPLATE.encode()).hexdigest()
    assert (chat["precision"], chat["device"]) == ("fp32", "cpu")
    text = served.complete(prompt="a", max_tokens=1, receipt=True)["regpt"]["receipt"]["model"]
    assert text == chat | {"template_sha256": None}


def test_texts_that_were_written_among_others_are_the_same_alone(served, run, tmp_path):
    async def all_at_once() -> list[dict]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            bodies = ({"model": "tiny", "prompt": f"p{i}", "max_tokens": 40, "receipt": True} for i in range(20))
            return [one.json() for one in await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))]

    for answer in asyncio.run(all_at_once())[::5]:
        (tmp_path / "a.json").write_text(json.dumps(answer))
        assert run(tmp_path / "a.json")[0] == 0


def test_structured_answers_have_receipts_too(served, run, tmp_path):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}
    asked = ASKED["chat/completions"] | {"response_format": form, "seed": 2, "receipt": True}
    (tmp_path / "a.json").write_text(served.post("chat/completions", **asked).text)
    assert json.loads(read_receipt(tmp_path / "a.json").json_schema or "") == SCHEMA
    assert run(tmp_path / "a.json")[0] == 0


def test_a_receipt_of_nothing_or_of_unknown_weights_is_refused(served):
    error = served.refused("completions", prompt="a", max_tokens=0, echo=True, receipt=True)
    assert (error["param"], error["code"]) == ("receipt", "invalid_value")
    with serving([loaded()]) as unknown:
        error = unknown.refused("completions", prompt="a", receipt=True)
        assert error["param"] == "receipt"
        assert "not read from files" in error["message"]


@pytest.fixture(scope="module")
def sampled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A receipt of `regpt sample`."""
    file = tmp_path_factory.mktemp("sampled") / "r.json"
    how = ["--prompt", "Once", "-n", "3", "--max-new-tokens", "20", "--top-k", "9", "--receipt", str(file)]
    assert main(["sample", str(checkpoint), *how]) == 0
    return json.loads(file.read_text())


def test_samples_of_the_command_line_need_no_model_named(sampled, run, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(sampled))
    assert run(tmp_path / "r.json", "--device", "auto")[0] == 0


def test_other_weights_are_named_with_both_hashes(sampled, run, tmp_path):
    other = tiny.build_model(config=CONFIG, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.5
    folder = tiny.save_model(tmp_path / "other" / "checkpoints" / "step-00000003", other, TOKENIZER)
    (tmp_path / "r.json").write_text(json.dumps(sampled))
    code, _, said = run(tmp_path / "r.json", "--model", folder)
    hashes = sampled["model"]["weights_sha256"], sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert code == 1
    assert all(one in said for one in hashes)
    assert "text 1 of 3 differs at token " in said
    assert said.count("\n") == 1


def test_the_same_weights_in_other_files_verify_and_it_is_said(sampled, run, tmp_path):
    export_hf(MODEL, TOKENIZER, tmp_path / "exported")
    (tmp_path / "r.json").write_text(json.dumps(sampled))
    code, _, said = run(tmp_path / "r.json", "--model", tmp_path / "exported")
    assert code == 0
    assert "other weights (SHA-256 " in said


def another_token(receipt: dict) -> None:
    receipt["texts"][1]["tokens"][4] ^= 1


def no_end(receipt: dict) -> None:
    del receipt["texts"][2]["tokens"][7:]


CHANGES = {
    another_token: "text 2 of 3 differs at token 5 of",
    no_end: "text 3 of 3 differs at token 8 of 7: the end in the receipt",
    (lambda receipt: receipt["texts"][0].update(seed=7)): "it was changed, or written by other code",
    (lambda receipt: receipt["options"].update(temperature=9.5)): "differs at token ",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_receipt_differs_at_the_token_that_is_named(sampled, run, tmp_path, change):
    changed = json.loads(json.dumps(sampled))
    change(changed)
    (tmp_path / "r.json").write_text(json.dumps(changed))
    code, _, said = run(tmp_path / "r.json")
    assert code == 1
    assert CHANGES[change] in said
    assert said.count("\n") == 1


def test_another_format_that_differs_is_named(sampled, run, tmp_path):
    changed = json.loads(json.dumps(sampled))
    changed["model"]["precision"] = "bf16"
    changed["texts"][0]["tokens"][2] ^= 1
    (tmp_path / "r.json").write_text(json.dumps(changed))
    assert "in bf16 a token may depend on what else was written" in run(tmp_path / "r.json")[2]
    code, _, said = run(tmp_path / "r.json", "--model", sampled["model"]["name"], "--precision", "fp32")
    assert code == 1
    assert "another number format (bf16 in the receipt, fp32 here)" in said


def test_a_token_that_only_rounding_decides_is_accepted_and_counted(sampled, monkeypatch):
    """Another device may round the two nearest scores the other way; the tokens after it follow from the receipt's."""
    (given := json.loads(json.dumps(sampled)))["texts"] = sampled["texts"][:1]
    tokens = given["texts"][0]["tokens"]
    monkeypatch.setattr(receipts.Engine, "run", lambda self, requests: [[[*tokens[:3], 0]]])
    real = receipts.Engine.uncached

    def near(self, text):
        (row, *rest) = real(self, text)
        if len(text.new) == 3:
            row[0, 0], row[0, 3] = (tokens[3] + 1) % 256, 0  # another token, and not certain
        return row, *rest

    monkeypatch.setattr(receipts.Engine, "uncached", near)
    receipt = receipts.parse_as(receipts.Receipt, json.dumps(given))
    (found,) = reproduce(receipt, MODEL, TOKENIZER)
    assert (found.differs, found.doubtful) == (None, [3])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 2, "future": true}',
        '{"regpt": {"seed": 3}}',
        {"texts": []},
        {"texts": [{"prompt": [], "seed": 1, "tokens": [5]}]},
        {"texts": [{"prompt": [1], "seed": 1, "tokens": []}]},
        {"texts": [{"prompt": [1], "seed": -1, "tokens": [5]}]},
        {"texts": [{"prompt": ["1"], "seed": 1, "tokens": [5]}]},
        {"texts": [{"prompt": [1], "seed": 1, "tokens": [5], "more": 1}]},
        {"texts": [{"prompt": [999], "seed": 1, "tokens": [5]}]},
        {"texts": [{"prompt": [1] * 96, "seed": 1, "tokens": [5]}]},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 10**30},
        {"options": {"temperature": -1}},
        {"options": {"heat": 1}},
        {"stop": [""]},
        {"json_schema": "{"},
        {"model": {"name": "x"}},
        {"format_version": 1.0},
        {"regpt_version": None},
    ],
)
def test_what_is_no_receipt_is_one_sentence(sampled, run, tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(sampled | content)
    (tmp_path / "r.json").write_text(text)
    code, out, said = run(tmp_path / "r.json")
    assert (code in (1, 2), out) == (True, "")
    assert said.startswith("regpt: ")
    assert said.count("\n") == 1


def test_a_missing_file_and_a_model_that_is_not_here_are_one_sentence(sampled, run, tmp_path):
    assert "cannot read" in run(tmp_path / "nowhere.json")[2]
    sampled = sampled | {"model": sampled["model"] | {"name": "s3://bucket/run"}}
    (tmp_path / "r.json").write_text(json.dumps(sampled))
    code, _, said = run(tmp_path / "r.json", "--device", "cpu")
    assert (code, said.count("\n")) == (1, 1)
    assert "name it with --model" in said


def test_a_receipt_states_the_format_of_keys_and_values(checkpoint, run, tmp_path):
    texts = {}
    for kv_cache in ("", "fp8"):
        file = tmp_path / f"r{kv_cache}.json"
        how = ["--prompt", "Once", "-n", "4", "--max-new-tokens", "40", "--receipt", str(file)]
        assert main(["sample", str(checkpoint), *how, *(["--kv-cache", kv_cache] if kv_cache else [])]) == 0
        receipt = json.loads(file.read_text())
        assert receipt["model"]["kv_cache"] == kv_cache
        texts[kv_cache] = receipt["texts"]
        assert run(file, "--device", "cpu")[0] == 0
    assert texts[""] != texts["fp8"]
    receipt["model"]["kv_cache"] = ""
    file.write_text(json.dumps(receipt))
    assert run(file, "--device", "cpu")[0] == 1


def test_a_sample_past_the_models_length_has_no_receipt(capsys, checkpoint):
    code = main(["sample", str(checkpoint), "--prompt", "a", "--past-context", "slide", "--receipt", "r.json"])
    assert code == 2
    assert "leave out --past-context slide" in capsys.readouterr().err
