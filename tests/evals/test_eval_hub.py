"""The documented check of OpenAI's weights, `regpt eval gpt2 --tasks hellaswag`, with a stand-in for the weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import Server
from regpt.cli.eval import main
from regpt.hf.export import export_hf
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import initialize
from regpt.text.gpt2 import load_gpt2

pytest.importorskip("huggingface_hub")
COMMAND = "regpt eval gpt2 --tasks hellaswag --precision bf16"
DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def hub(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def test_gpt2_is_fetched_from_the_hub_and_judged(hub, tmp_path, capsys):
    assert COMMAND in DOCUMENT.read_text(encoding="utf-8")
    model = initialize(make_model(ModelConfig(n_layer=1, n_head=2, n_embd=8)), seed=1)
    folder = export_hf(model, load_gpt2(), hub.root / "gpt2")
    items = tmp_path / "hellaswag_val.jsonl"
    rows = [{"ctx": f"The {k}th", "endings": [f"is {k * j}." for j in range(4)], "label": k % 4} for k in range(30)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, *typed = COMMAND.replace("hellaswag", f"hellaswag:{items}").split()
    typed += ["--device", "cpu", "--json", "-"]
    code = "import sys; from regpt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *typed]
    done = subprocess.run(command, env=hub.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fetched = json.loads(done.stdout)
    assert fetched["source"] == "openai-community/gpt2"
    assert main([str(folder), *typed[2:]]) == 0
    local = json.loads(capsys.readouterr().out)
    assert fetched["tasks"]["hellaswag"]["metrics"] == local["tasks"]["hellaswag"]["metrics"]
    assert fetched["tasks"]["hellaswag"]["n"] == 30
