"""Every family through every command: trained, resumed, evaluated, sampled, exported, reported, compared."""

import json
from pathlib import Path

import pytest
from short_runs import RUN, SHAPE, SHORT

from regpt.model.config import FAMILIES

CHANGES = {
    "gpt2": ["--model.activation", "relu", "--model.bias", "none", "--model.tie-embeddings", "false"],
    "llama": ["--model.n-kv-head", "1", "--model.rope-type", "linear", "--model.rope-factor", "2"],
    "mistral": ["--model.window", "5"],
    "qwen3": ["--model.head-size", "6"],
    "smollm3": ["--model.no-rope-every", "2", "--model.n-layer", "2"],
    "gemma3_text": ["--model.window", "5", "--model.full-attention-every", "2", "--model.n-layer", "2"],
    "mixtral": ["--model.n-expert", "3"],
    "olmoe": ["--model.n-expert", "4", "--model.n-expert-active", "3", "--model.norm-topk", "false"],
    "gpt_neox": ["--model.rope-fraction", "0.25", "--model.tie-embeddings", "false"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_command(family: str, corpus: Path, tmp_path: Path, regpt):
    def done(*args: object) -> str:
        code, out, err = regpt(*args)
        assert code == 0, err
        return out

    flags = ["--data", corpus, *SHAPE, *RUN, *SHORT, "--model.family", family, "--model.n-inner", "24"]
    flags += ["--train.precision", "fp32", "--train.compile", "false", "--train.device", "cpu"]
    flags += ["--train.deterministic", "true", *CHANGES.get(family, [])]
    run, twin = tmp_path / "run", tmp_path / "twin"
    done("train", "gpt2-tiny", "--out", run, *flags, "--checkpoint.every-steps", "2")
    done("train", "gpt2-tiny", "--out", twin, *flags, "--train.steps", "2")
    done("train", "--resume", twin, "--train.steps", "3")
    weights = [(folder / "checkpoints/step-00000003/model.safetensors").read_bytes() for folder in (run, twin)]
    assert weights[0] == weights[1]
    done("eval", run, "--tasks", "val", "--data", corpus, "--json", tmp_path / "eval.json")
    assert done("sample", run, "--prompt", "the cat", "-n", "2", "--max-new-tokens", "6")
    done("export", run, "--format", "hf", "--out", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == family
    done("eval", tmp_path / "hf", "--tasks", "val", "--data", corpus, "--json", tmp_path / "hf.json")
    losses = [json.loads((tmp_path / name).read_text()) for name in ("eval.json", "hf.json")]
    for one in losses:
        del one["tasks"]["val"]["data"]
    assert losses[0]["tasks"] == losses[1]["tasks"]
    done("report", run, "--out", tmp_path / "report.html")
    done("inspect", run)
    done("diff", run, twin)
    done("plan", run / "config.toml", "--gpu", "h100")
    done("checkpoint", "verify", run)
