"""The adapter for lm-eval against lm-eval's own Hugging Face backend on the exported model; tasks read local JSON."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import tiny
from regpt.hf.added_tokens import add_special_tokens
from regpt.hf.export import export_hf
from regpt.text.bpe import train_bpe
from regpt.text.chat import CHATML, CHATML_TOKENS
from regpt.text.folder import CHAT

missing = [
    name for name in ("lm_eval", "accelerate", "transformers") if find_spec(name) is None
]  # importing takes long
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
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
    "lastword_of_long_texts": """
task: lastword_of_long_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: acc}}
""",
    "writing_after_long_texts": """
task: writing_after_long_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: "q", max_gen_toks: 8, temperature: 0.0, top_p: 0.9, num_beams: 1}}
metric_list:
  - {{metric: exact_match}}
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
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from regpt.checkpoint.open import open_model
from regpt.evals.harness import HarnessModel, results_of
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
folder, tasks, out, *names = sys.argv[1:]
opened = open_model(folder)
model = HarnessModel(Scorer(opened.model.double(), Mesh(0, 1, torch.device("cpu"))), opened.tokenizer)
found = simple_evaluate(model=model, tasks=names, bootstrap_iters=100, task_manager=TaskManager(include_path=tasks))
results = [
    [one.task, {name: (x.value, x.stderr) for name, x in one.estimates().items()}, one.n_items,
     [json.loads(line) for line in one.item_lines().splitlines()]]
    for one in results_of(found, model.truncated)
]
truncated = {task: len(documents) for task, documents in model.truncated.items()}
json.dump({"results": results, "samples": found["samples"], "truncated": truncated}, open(out, "w"), default=str)
"""
ARGUMENTS = """
import sys
import pytest, torch
from regpt.checkpoint.open import open_model
from regpt.errors import UserError
from regpt.evals.harness import GREEDY, HarnessModel, generation_of
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
from regpt.engine.processing import SamplingOptions as Options
for given, sampling in (
    ({}, GREEDY),
    ({"do_sample": False, "temperature": 0.8, "top_k": 5}, GREEDY),
    ({"temperature": 0.8}, Options(temperature=0.8, top_k=0)),
    ({"do_sample": True, "top_k": 5, "top_p": 0.9}, Options(temperature=1.0, top_k=5, top_p=0.9)),
    ({"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.0, "num_beams": 1, "seed": None}, Options(0.5, 0)),
):
    assert generation_of(given).sampling == sampling, given
assert generation_of({"max_new_tokens": 5, "until": "a"})[1:] == (5, ["a"])
assert generation_of({"until": None})[1:] == (256, [])
for given, said in (
    ({"num_beams": 4}, "num_beams = 4, which the adapter does not follow"),
    ({"repetition_penalty": 1.2, "min_p": 0.1}, "repetition_penalty = 1.2, min_p = 0.1"),
    ({"do_sample": True, "top_p": 7}, "top-p is 7"),
    ({"temperature": "hot"}, "not of the right kind"),
    ({"max_gen_toks": 0}, "max_gen_toks is 0"),
    ({"until": [5]}, "until"),
):
    with pytest.raises(UserError, match=said):
        generation_of(given)
opened = open_model(sys.argv[1])
model = HarnessModel(Scorer(opened.model, Mesh(0, 1, torch.device("cpu"))), opened.tokenizer)
ids = list(range(100))
assert model.fitted(ids[:20], 8) == (ids[:20], 8)
assert model.fitted(ids[:45], 8) == (ids[5:45], 8)
assert model.fitted(ids[:45], 48) == (ids[:45], 3)
assert model.fitted(ids[:48], 300) == (ids[24:48], 24)
drawn = {"until": [], "max_gen_toks": 12, "temperature": 2.0}
def texts_of(options, *seeds):
    return model.continuations([model.asked_of("the cat", options, seed) for seed in seeds])
texts = texts_of(drawn, 1, 2)
assert texts[0] != texts[1]
assert texts_of(drawn, 1) == texts[:1]
read, logits = [], opened.model.logits
opened.model.logits = lambda hidden: read.append(1) or logits(hidden)
stop = texts[0][3]
(short,) = texts_of(drawn | {"until": [stop]}, 1)
assert short == texts[0].split(stop)[0]
assert len(read) < 12, "the text was written to its limit"
print("all arguments were followed or refused", file=sys.stderr)
"""
CHATS = """
import json, sys
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from regpt.checkpoint.open import open_model
from regpt.evals.harness import HarnessModel
from regpt.evals.score import Scorer
from regpt.parallel.mesh import Mesh
from regpt.text.chat import ChatTemplate
folder, tasks, out, *names = sys.argv[1:]
opened = open_model(folder)
template = ChatTemplate(opened.companions["chat_template.jinja"], opened.tokenizer)
scorer = Scorer(opened.model.double(), Mesh(0, 1, torch.device("cpu")))
ours = HarnessModel(scorer, opened.tokenizer, template=template)
theirs = HFLM(pretrained=folder, device="cpu", dtype="float64", batch_size=4)
asked = {"apply_chat_template": True, "system_instruction": "be brief", "bootstrap_iters": 10}
found = []
for model in (ours, theirs):
    one = simple_evaluate(model=model, tasks=names, task_manager=TaskManager(include_path=tasks), **asked)
    found.append(one["samples"])
messages = [{"role": "user", "content": "<|im_end|> the cat"}]
rendered = ours.apply_chat_template(messages)
assert ours.tok_encode(rendered) == template.encode(messages)
assert ours.tok_encode(rendered).count(template.special["<|im_end|>"]) == 1, "what a user writes made a special token"
begun = ours.apply_chat_template([*messages, {"role": "assistant", "content": "a mat"}], add_generation_prompt=False)
assert begun == rendered + "a mat"
assert ours.tok_encode(begun) == template.encode(messages) + opened.tokenizer.encode("a mat")
assert ours.tokenizer_name == f"{opened.tokenizer.name}-{template.sha256[:8]}"
assert ours.chat_template(True) == template.source
json.dump(found, open(out, "w"), default=str)
"""
COMMAND = """
import json, sys
from regpt.__main__ import main
model, names, unknown, missing, *rest = sys.argv[1:]
asked = ["eval", model, "--device", "cpu", "--tasks"]
assert main([*asked, f"lm-eval:{names}", *rest]) == 1  # beams.yaml cannot be done
for name in (unknown, missing):
    assert main([*asked, f"lm-eval:{name}"]) == 2, name
"""


ONE_AFTER_ANOTHER = """
import json, sys
for code, *arguments in json.load(open(sys.argv[1])):
    sys.argv[1:] = arguments
    exec(code, {})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Items, tasks that read them, and an exported model."""
    folder, draw = tmp_path_factory.mktemp("harness"), np.random.default_rng(0)

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
    beams = TASKS["writing"].replace("max_gen_toks: 8", "num_beams: 4").replace("task: writing", "task: beams")
    nothing = TASKS["choices"].replace("task: choices", "task: nothing")
    (folder / "more").mkdir()
    (folder / "more" / "beams.yaml").write_text(beams.format(data=folder / "data.jsonl"), encoding="utf-8")
    (folder / "more" / "nothing.yaml").write_text(nothing.format(data=folder / "nothing.jsonl"), encoding="utf-8")
    tokenizer = train_bpe([" ".join(WORDS * 3)], 290)
    config = tiny.replace(tiny.CONFIG, vocab_size=290, max_seq_len=48)
    export_hf(tiny.build_model(config=config, dtype=tiny.torch.float32), tokenizer, folder / "model")
    chatty = add_special_tokens(tokenizer, CHATML_TOKENS, CHATML_TOKENS[1:])
    model = tiny.build_model(config=tiny.replace(config, vocab_size=292, max_seq_len=256), dtype=tiny.torch.float32)
    export_hf(model, chatty, folder / "chat", companions={CHAT: CHATML})
    return folder


@pytest.fixture(scope="module")
def said(folder) -> str:
    """The error stream of one process that runs everything, because importing the harness takes long; not of this
    process, because the harness sets random seeds and handlers."""
    model, names = folder / "model", [folder / "more" / "beams.yaml", folder / "more" / "nothing.yaml"]
    names = ",".join(map(str, [*names, folder / "choices.yaml", folder / "lastword.yaml"]))
    codes = [
        (THEIRS, model, folder, folder / "theirs.json", *TASKS),
        (OURS, model, folder, folder / "ours.json", *TASKS),
        (CHATS, folder / "chat", folder, folder / "chats.json", "fewshot", "writing"),
        (ARGUMENTS, model),
        (COMMAND, model, names, "arc_eazy", folder / "no.yaml"),
    ]
    codes[-1] += ("--json", folder / "out.json", "--items", folder / "it")
    (folder / "codes.json").write_text(json.dumps(codes, default=str), encoding="utf-8")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "DISABLE_MULTIPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, folder / "codes.json"],
        cwd=folder,
        env=tiny.os.environ | env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stderr


def test_every_answer_is_that_of_the_hugging_face_backend(folder, said):
    """Log-likelihoods, greedy text, judgements of each item, and metrics with their standard errors."""
    theirs, ours = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("theirs.json", "ours.json"))
    found = {task: rest for task, *rest in ours["results"]}
    for task in TASKS:
        expected, answered = ({one["doc_id"]: one for one in each["samples"][task]} for each in (theirs, ours))
        assert len(expected) == 24
        for number, one in expected.items():
            same_answers(answered[number]["filtered_resps"], one["filtered_resps"])
        metrics, n, items = found[f"lm-eval/{task}"]
        assert n == 24
        same_metrics(metrics, theirs["results"][task])
        for row in items:
            for metric in {"acc", "acc_norm"} & row.keys():
                assert row[metric] == float(expected[row["item"]][metric])
    assert 5 < ours["truncated"]["writing_after_long_texts"] < 24
    assert 5 < ours["truncated"]["lastword_of_long_texts"] < 24
    assert not {"writing", "lastword", "choices", "rolling"} & ours["truncated"].keys()


def test_a_chat_is_that_of_the_hugging_face_backend(folder, said):
    """Prompts and texts. Its log-likelihood of an answer is also that of the line end before it, which it takes from
    the prompt: the same for all answers to one question."""
    ours, theirs = json.loads((folder / "chats.json").read_text(encoding="utf-8"))
    for task in ("fewshot", "writing"):
        each = [sorted(one[task], key=lambda sample: sample["doc_id"]) for one in (ours, theirs)]
        assert len(each[0]) == 24
        for here, there in zip(*each):
            assert [here["arguments"], here["doc"]] == [there["arguments"], there["doc"]]
            prompt = here["arguments"][0][0]
            assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")
            assert prompt.count("<|im_start|>assistant") == (4 if task == "fewshot" else 1)
            if task == "writing":
                assert here["filtered_resps"] == there["filtered_resps"]
                continue
            answers = [[float(pair[0]) for pair in one["filtered_resps"]] for one in (here, there)]
            more = np.subtract(*answers)
            assert more.max() - more.min() < 1e-9
            assert more.min() > 0.01


def same_answers(given: list, expected: list) -> None:
    """Texts, log-likelihoods, or pairs of a log-likelihood and whether it was the greedy choice."""
    assert len(given) == len(expected) > 0
    for one, other in zip(given, expected):
        if isinstance(other, str):
            assert one == other
        else:
            assert one == pytest.approx(other, rel=1e-9)


def same_metrics(given: dict[str, list], expected: dict[str, float | str]) -> None:
    assert given
    for name, (value, error) in given.items():
        assert value == pytest.approx(expected[f"{name},none"], rel=1e-6, abs=1e-9)
        theirs = expected[f"{name}_stderr,none"]
        assert error == pytest.approx(theirs, rel=0.2) if isinstance(theirs, float) else error is None


def test_arguments_of_generation_are_followed_or_refused_by_name(said):
    assert "all arguments were followed or refused" in said


def test_the_command_runs_tasks_by_file_and_refuses_others_in_one_sentence(folder, said):
    assert "lm-eval knows no task 'arc_eazy'" in said
    assert "no.yaml' does not exist" in said
    assert "lm-eval/beams was not evaluated: the task asks for num_beams = 4, which the adapter does not follow" in said
    assert "lm-eval/nothing was not evaluated: lm-eval cannot load 'nothing'" in said
    tasks = json.loads((folder / "out.json").read_text(encoding="utf-8"))["tasks"]
    assert list(tasks) == ["lm-eval/choices", "lm-eval/lastword"]
    assert tasks["lm-eval/choices"]["n"] == 24
    lines = (folder / "it" / "lm-eval-choices-step-00000000.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row.keys() for row in rows] == [{"item", "acc", "acc_norm"}] * 24
    accuracy = tasks["lm-eval/choices"]["metrics"]["acc"]["value"]
    assert accuracy == pytest.approx(sum(row["acc"] for row in rows) / 24)
