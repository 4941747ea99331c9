"""The adapter for lm-eval against lm-eval's own Hugging Face backend on the exported model; tasks read local JSON."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from regpt.checkpoint.export import export_hf
from regpt.text.bpe import train_bpe

missing = [
    name for name in ("lm_eval", "accelerate", "transformers") if find_spec(name) is None
]  # importing takes long
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]
TEXT = "the cat sat on a mat and dogs ran home in the rain while birds sang of spring"
WORDS = TEXT.split()
TASKS = {
    "choices": """
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
""",
    "fewshot": """
task: fewshot
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
num_fewshot: 3
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc}}
""",
    "lastword": """
task: lastword
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{ctx}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: perplexity}}
  - {{metric: acc}}
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: ["a"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
""",
}
THEIRS = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
folder, tasks, out, *names = sys.argv[1:]
model = HFLM(pretrained=folder, device="cpu", dtype="float64", batch_size=4)
found = simple_evaluate(model=model, tasks=names, bootstrap_iters=100, task_manager=TaskManager(include_path=tasks))
keep = {"results": found["results"], "samples": found["samples"]}
json.dump(keep, open(out, "w"), default=str)
"""
OURS = """
import json, sys
from pathlib import Path
import torch
from regpt.checkpoint.open import open_model
from regpt.evals.harness import HarnessModel, evaluate_harness
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
folder, out, *names = sys.argv[1:]
opened = open_model(folder)
scorer = Scorer(opened.model.double(), Mesh(0, 1, torch.device("cpu")))
results = evaluate_harness(names, HarnessModel(scorer, opened.tokenizer))
keep = [[one.task, one.metrics, one.n, one.items] for one in results]
json.dump({"results": keep}, open(out, "w"))
"""


def run(code: str, cwd: Path, *args: object) -> None:
    """In a process of its own: the harness sets random seeds and handlers of this one."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "DISABLE_MULTIPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=tiny.os.environ | env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not done.returncode, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Their results and ours on the same model and items."""
    folder = tmp_path_factory.mktemp("harness")
    draw = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS, size=n))

    rows = [
        {
            "ctx": text(int(draw.integers(1, 9))),
            "endings": [text(int(draw.integers(1, 4))) for _ in range(4)],
            "label": int(draw.integers(4)),
            "word": str(draw.choice(WORDS)),
            "text": text(int(draw.integers(1, 60))),
        }
        for _ in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, yaml in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.format(data=folder / "data.jsonl"), encoding="utf-8")
    tokenizer = train_bpe([" ".join(WORDS * 3)], 290)
    config = tiny.replace(tiny.CONFIG, vocab_size=290, max_seq_len=48)
    export_hf(tiny.build_model(config=config, dtype=tiny.torch.float32), tokenizer, folder / "model")
    run(THEIRS, folder, folder / "model", folder, folder / "theirs.json", *TASKS)
    files = [folder / f"{name}.yaml" for name in TASKS]
    run(OURS, folder, folder / "model", folder / "ours.json", *files)
    return folder, *(json.loads((folder / name).read_text(encoding="utf-8")) for name in ("theirs.json", "ours.json"))


def ours(found: tuple[Path, dict, dict], task: str) -> tuple[dict[str, list], int, list[dict]]:
    (one,) = [row for row in found[2]["results"] if row[0] == f"lm-eval/{task}"]
    return one[1], one[2], one[3]


@pytest.mark.parametrize("task", list(TASKS))
def test_metrics_and_errors_are_those_of_the_hugging_face_backend(found, task):
    theirs, (metrics, n, _) = found[1]["results"][task], ours(found, task)
    assert n == 24
    assert metrics
    for name, (value, error) in metrics.items():
        assert value == pytest.approx(theirs[f"{name},none"], rel=1e-6, abs=1e-9)
        expected = theirs[f"{name}_stderr,none"]
        assert error == pytest.approx(expected, rel=0.2) if isinstance(expected, float) else error is None


def test_every_item_is_judged_alike(found):
    theirs = {one["doc_id"]: one for one in found[1]["samples"]["choices"]}
    for row in ours(found, "choices")[2]:
        for metric in ("acc", "acc_norm"):
            assert row[metric] == float(theirs[row["item"]][metric])


def test_the_command_runs_tasks_by_file_and_writes_items(found, tmp_path):
    folder, theirs, _ = found
    code = "import sys; from regpt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    names = f"lm-eval:{folder / 'choices.yaml'},{folder / 'lastword.yaml'}"
    args = ["eval", folder / "model", "--tasks", names, "--device", "cpu", "--json", tmp_path / "out.json"]
    run(code, folder, *args, "--items", tmp_path / "items")
    tasks = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["tasks"]
    assert list(tasks) == ["lm-eval/choices", "lm-eval/lastword"]
    assert tasks["lm-eval/choices"]["metrics"]["acc"]["value"] == pytest.approx(
        theirs["results"]["choices"]["acc,none"]
    )
    lines = (tmp_path / "items" / "lm-eval-choices-step-00000000.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24
    assert json.loads(lines[0]).keys() == {"item", "acc", "acc_norm"}


def test_a_task_that_is_unknown_or_a_file_that_is_missing_is_one_sentence(found):
    folder = found[0]
    code = (
        "import sys; from regpt.__main__ import main\n"
        "code = main(['eval', sys.argv[1], '--device', 'cpu', '--tasks', sys.argv[2]])\n"
        "assert code == 2, code"
    )
    for name in ("arc_eazy", "no.yaml"):
        run(code, folder, folder / "model", f"lm-eval:{name}")
