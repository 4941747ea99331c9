"""Hub names, against a local server that imitates the hub; nothing here reaches the internet."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from hub_server import Server
from regpt.errors import UserError
from regpt.hf.export import export_hf
from regpt.hf.hub import download_model, repository
from regpt.tensors import write_divided

pytest.importorskip("huggingface_hub")

OPEN = """
import sys, warnings
warnings.simplefilter("error")
from regpt.checkpoint.open import open_model
from regpt.errors import UserError
try:
    opened = open_model(sys.argv[1])
except UserError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(opened.source, opened.model.config.n_embd, opened.tokenizer.n_vocab)
"""


class Client(Server):
    def open(self, name: str) -> str:
        """What a process says that opens a model and takes the imitation for the hub."""
        command = [sys.executable, "-c", OPEN, name]
        env = self.environment()
        done = subprocess.run(command, env=env, cwd=self.root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def hub(tmp_path):
    server = Client(tmp_path)
    yield server
    server.stop()


def test_a_model_is_downloaded_once_and_opens_without_the_hub(hub, model, tokenizer):
    folder = export_hf(model, tokenizer, hub.root / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    assert hub.open("someone/tiny") == "someone/tiny 27 263"
    fetched = sorted(line.split()[1] for line in hub.asked if line.startswith("GET"))
    assert fetched == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    hub.stop()
    assert hub.open("someone/tiny") == "someone/tiny 27 263"
    said = hub.open("someone/other")
    assert said.startswith("UserError: model 'someone/other' is not a file or folder here and not in the hub's cache")
    assert "give a local folder" in said


def test_a_model_with_vocabulary_and_merges_is_downloaded_with_them(hub, model, tokenizer):
    folder = export_hf(model, tokenizer, hub.root / "old")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer.rules.vocab), encoding="utf-8")
    merges = "#version: 0.2\n" + "\n".join(map(" ".join, tokenizer.rules.merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    assert hub.open("someone/old") == "someone/old 27 263"
    fetched = sorted(line.split()[1] for line in hub.asked if line.startswith("GET"))
    assert fetched == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]


def test_divided_weights_and_every_file_of_the_tokenizer_are_downloaded_and_nothing_else(hub, model, tokenizer):
    folder = export_hf(model, tokenizer, hub.root / "whole")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_divided(folder, "model", weights, 20_000)
    wanted = {file.name for file in folder.iterdir()}
    assert len(wanted) > 7
    texts = {"chat_template.jinja": "{{ x }}", "special_tokens_map.json": "{}", "tokenizer.model": "unread"}
    others = ("pytorch_model.bin", "consolidated.00.pth", "tiny-q4.gguf", "onnx.onnx", "README.md")
    for name, content in texts.items() | dict.fromkeys(others, "never asked for").items():
        (folder / name).write_text(content)
    assert hub.open("someone/whole") == "someone/whole 27 263"
    assert {line.split()[1] for line in hub.asked if line.startswith("GET")} == wanted | texts.keys()


def test_an_unknown_repository_and_one_without_safetensors_are_one_sentence(hub, model, tokenizer):
    assert hub.open("someone/typo").startswith(
        "UserError: the hub has no public repository 'someone/typo'; check the name"
    )
    folder = export_hf(model, tokenizer, hub.root / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = hub.open("someone/pickled")
    assert said.startswith(
        "UserError: hub repository 'someone/pickled' has no model.safetensors, and regpt never reads"
    )
    assert not any("pytorch_model.bin" in line for line in hub.asked)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_downloaded(hub):
    (hub.root / "bloom").mkdir()
    (hub.root / "bloom" / "config.json").write_text('{"model_type": "bloom"}')
    (hub.root / "bloom" / "model.safetensors").write_bytes(b"gigabytes")
    assert "config.json has model_type 'bloom'" in hub.open("someone/bloom")
    assert not any("safetensors" in line for line in hub.asked)


def test_short_names_are_openais_repositories():
    assert repository("gpt2-xl") == "openai-community/gpt2-xl"
    assert repository("openai-community/gpt2") == "openai-community/gpt2"
    assert [repository(name) for name in ("bert", "a/b/c", "../x", "/x/y", "")] == [None] * 5
    assert [repository(name) for name in ("a/b..c", "a--b/c", "a/b.git", "a/b-", "ä/b", "a/" + "b" * 95)] == [None] * 6


def test_what_the_hubs_cache_holds_is_found_without_asking_the_network(monkeypatch, tmp_path):
    def ask(*where, **_):
        asked.append(where)
        raise OSError("no network")

    asked: list[tuple] = []
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("socket.getaddrinfo", ask)
    with pytest.raises(UserError, match=r"'someone/absent' is .* not in the hub's cache, .* \(HF_HUB_OFFLINE is set\)"):
        download_model("someone/absent")
    assert asked == []
