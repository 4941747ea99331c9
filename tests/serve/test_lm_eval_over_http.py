"""lm-eval's `local-completions` over the server gives the scores of the adapter in a process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from serving import loaded, serving

import tiny
from regpt.checkpoint.open import open_model
from regpt.hf.added_tokens import add_special_tokens
from regpt.hf.export import export_hf
from regpt.text.bpe import train_bpe
from regpt.text.chat import CHATML, CHATML_TOKENS
from regpt.text.folder import CHAT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("lm_eval", "transformers", "tenacity"))), reason="lm-eval is not installed"
    ),
]
TEXT = "the cat sat on a mat and dogs ran home in the rain while birds sang of spring"
WORDS = TEXT.split()
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
CHAT_TASK = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{ctx}}}}"
generation_kwargs: {{until: ["q"], max_gen_toks: 12, temperature: 0.0}}
metric_list:
  - {{metric: exact_match}}
"""
CHAT_CODE = """
import json, sys
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalChatCompletion
from lm_eval.tasks import TaskManager
from regpt.checkpoint.open import open_model
from regpt.evals.harness import HarnessModel
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
from regpt.text.chat import ChatTemplate
folder, url = sys.argv[1:]
opened = open_model(folder + "/model")
template = ChatTemplate(opened.companions["chat_template.jinja"], opened.tokenizer)
here = HarnessModel(Scorer(opened.model, Mesh(0, 1, torch.device("cpu"))), opened.tokenizer, template=template)
there = LocalChatCompletion(base_url=url + "/v1/chat/completions", model="tiny")
asked = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "be brief"}
found = []
for model in (here, there):
    manager = TaskManager(include_path=folder)
    one = simple_evaluate(model=model, tasks=["writing"], bootstrap_iters=10, task_manager=manager, **asked)
    samples = sorted(one["samples"]["writing"], key=lambda sample: sample["doc_id"])
    found.append([sample["filtered_resps"] for sample in samples])
json.dump(found, open(folder + "/found.json", "w"), default=str)
"""
CODE = """
import json, sys
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from regpt.checkpoint.open import open_model
from regpt.evals.harness import HarnessModel
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
folder, url = sys.argv[1:]
opened = open_model(folder + "/model")
here = HarnessModel(Scorer(opened.model, Mesh(0, 1, torch.device("cpu"))), opened.tokenizer)
there = LocalCompletionsAPI(base_url=url + "/v1/completions", model="tiny", tokenizer=folder + "/model",
    tokenizer_backend="huggingface", max_length=48, batch_size=4)
found = []
for model in (here, there):
    manager = TaskManager(include_path=folder)
    one = simple_evaluate(model=model, tasks=["choices"], bootstrap_iters=10, task_manager=manager)
    samples = sorted(one["samples"]["choices"], key=lambda sample: sample["doc_id"])
    found.append([one["results"]["choices"], [sample["filtered_resps"] for sample in samples]])
json.dump(found, open(folder + "/found.json", "w"), default=str)
"""


def both(tmp_path: Path, name: str, task: str, code: str, *, chat: bool) -> list[list]:
    """What `code` finds for the task in its process, and over the server."""
    draw = np.random.default_rng(0)
    text = lambda most: " ".join(draw.choice(WORDS, size=int(draw.integers(1, most))))  # noqa: E731
    rows = [{"ctx": text(9), "endings": [text(4) for _ in range(4)], "label": int(draw.integers(4))} for _ in range(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / f"{name}.yaml").write_text(task.format(data=data), encoding="utf-8")
    tokenizer = train_bpe([" ".join(WORDS * 3)], 290)
    tokenizer = add_special_tokens(tokenizer, CHATML_TOKENS, CHATML_TOKENS[1:]) if chat else tokenizer
    config = tiny.replace(tiny.CONFIG, vocab_size=tokenizer.n_vocab, max_seq_len=256 if chat else 48)
    model = tiny.build_model(config=config, dtype=tiny.torch.float32)
    export_hf(model, tokenizer, tmp_path / "model", companions={CHAT: CHATML} if chat else None)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "DISABLE_MULTIPROC": "1", "OMP_NUM_THREADS": "1"}
    env |= {"OPENAI_API_KEY": "none"}
    source = {"template": CHATML} if chat else {}
    with serving([loaded(opened=open_model(str(tmp_path / "model")), **source)]) as running:
        command = [sys.executable, "-c", code, str(tmp_path), running.url]
        done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))


def test_local_chat_completions_writes_the_texts_of_the_adapter_in_a_process(tmp_path: Path):
    here, there = both(tmp_path, "writing", CHAT_TASK, CHAT_CODE, chat=True)
    assert len({text for (text,) in here}) > 3
    assert here == there


def test_local_completions_gives_the_scores_of_the_adapter_in_a_process(tmp_path: Path):
    here, there = both(tmp_path, "choices", TASK, CODE, chat=False)
    for metric in ("acc,none", "acc_norm,none"):
        assert round(here[0][metric], 4) == round(there[0][metric], 4)
    answers = [np.array(one[1], dtype=object)[..., 0].astype(float) for one in (here, there)]
    assert np.abs(answers[0] - answers[1]).max() < 1e-4
    assert [[pair[1] for pair in item] for item in here[1]] == [[pair[1] for pair in item] for item in there[1]]
