import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from naive import naive_scores
from regpt.data.order import splitmix64
from regpt.errors import UsageError, UserError
from regpt.evals.core import TASKS, CoreSettings, CoreTask, Example, common, open_core, shots_for, summarize
from regpt.evals.score import Scorer
from regpt.evals.specs import Spec
from regpt.evals.suite import open_suites, suite_rows
from regpt.evals.task import Result, evaluate_task
from regpt.text.bpe import BPETokenizer, train_bpe

SHARED = Path(__file__).parents[3] / "shared" / "data" / "evals"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files beside the repository are absent")
CHOICE = [
    {"query": "Question: what is red?\n", "choices": ["blood", "the sky", "grass"], "gold": 0},
    {"query": "Question: what is blue?", "choices": ["blood", "the sky", "grass"], "gold": 1},
    {"query": "Question: what is green?", "choices": ["blood", "the sky", "grass"], "gold": 2},
    {"query": "Question: what is wet?", "choices": ["the sea", "sand", "glass"], "gold": "0"},
]
SCHEMA = [
    {
        "context_options": ["The cat sat because the cat", "The cat sat because the mat"],
        "continuation": "was tired.",
        "gold": 0,
    },
    {"context_options": ["He ran as he", "She ran as he"], "continuation": "was late.", "gold": 1},
    {"context_options": ["One", "Two"], "continuation": "is odd.", "gold": 0},
]
WORDS = [
    {"context": "the capital of France is  ", "continuation": "Paris"},
    {"context": "two and two are", "continuation": "four"},
    {"context": "", "continuation": "a story"},
]
FILES = {"arc_easy": CHOICE, "winograd": SCHEMA, "jeopardy": WORDS}
ENTRIES = [
    ("arc_easy", "multiple_choice", 2, 0.25, "\nAnswer: "),
    ("winograd", "schema", 1, 0.5, " "),
    ("jeopardy", "language_modeling", 10, 0.0, "\nAnswer: "),
    ("squad", "language_modeling", 10, 0.0, " "),
]


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    keys = ("task", "type", "num_fewshot", "random_baseline", "continuation_delimiter")
    entries = [
        dict(zip(keys, entry)) | {"file": f"{entry[0]}.jsonl" if entry[0] in FILES else None} for entry in ENTRIES
    ]
    entries[0] |= changes
    (folder / "core.json").write_text(json.dumps(entries), encoding="utf-8")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([json.dumps([CHOICE, SCHEMA, WORDS])], 300)


@pytest.fixture(scope="module")
def model():
    return tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=300, max_seq_len=400))


@pytest.fixture
def tasks(tmp_path, tokenizer) -> dict[str, CoreTask]:
    found, _ = open_core(write(tmp_path / "core"), tokenizer, tokenizer.eot)
    return {task.name.removeprefix("core/"): task for task in found}


# ---- prompts, written out --------------------------------------------------------------------------------------------


def texts(task: CoreTask, i: int, tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    """What stands before each scored part, and the part, as text."""
    context, endings, scored = task.prompt(i)
    whole = [np.concatenate([context, ending]) for ending in endings]
    return [(tokenizer.decode(row[:-n].tolist()), tokenizer.decode(row[-n:].tolist())) for row, n in zip(whole, scored)]


def test_a_multiple_choice_prompt_is_written_as_the_paper_does(tasks, tokenizer):
    shown = [CHOICE[k] for k in shots_for(0, 4, 2)]
    before = "".join(f"{one['query']}\nAnswer: {one['choices'][int(one['gold'])]}\n" for one in shown)
    asked = f"{before}Question: what is red?\nAnswer:"  # without the query's own line break
    assert texts(tasks["arc_easy"], 0, tokenizer) == [(asked, " blood"), (asked, " the sky"), (asked, " grass")]


def test_a_schema_prompt_scores_the_same_words_after_each_context(tasks, tokenizer):
    (k,) = shots_for(1, 3, 1)
    before = f"{SCHEMA[k]['context_options'][SCHEMA[k]['gold']]} {SCHEMA[k]['continuation']}\n"
    assert texts(tasks["winograd"], 1, tokenizer) == [
        (f"{before}He ran as he", " was late."),
        (f"{before}She ran as he", " was late."),
    ]
    context, endings, scored = tasks["winograd"].prompt(0)
    assert tokenizer.decode(context.tolist()).rstrip().endswith("The cat sat because the")  # which both have
    assert scored[0] == scored[1] < len(endings[0])


def test_a_language_prompt_shows_as_many_examples_as_there_are(tasks, tokenizer):
    order = shots_for(1, 3, 10)
    assert sorted(order) == [0, 2]
    shown = {0: "the capital of France is\nAnswer: Paris\n", 2: "\nAnswer: a story\n"}
    before = "".join(shown[k] for k in order)
    assert texts(tasks["jeopardy"], 1, tokenizer) == [(f"{before}two and two are\nAnswer:", " four")]


def test_examples_are_different_others_and_always_the_same():
    drawn = [shots_for(i, 50, 10) for i in range(50)]
    assert all(len(set(one)) == 10 and i not in one for i, one in enumerate(drawn))
    assert drawn == [shots_for(i, 50, 10) for i in range(50)]
    assert np.bincount(np.concatenate(drawn)).std() < 5  # none is everywhere
    assert shots_for(3, 50, 0) == []
    seed = int(splitmix64(1234, 7, 1)[0])  # as specified
    expected = [k for k in dict.fromkeys((splitmix64(seed, 0, 20) % np.uint64(50)).tolist()) if k != 7][:10]
    assert shots_for(7, 50, 10) == expected


def test_the_tokens_that_rows_begin_with():
    assert common([np.array([1, 2, 3]), np.array([1, 2, 4, 5])]) == 2
    assert common([np.array([1, 2]), np.array([1, 2, 4])]) == 2
    assert common([np.array([1]), np.array([2])]) == 0


def test_an_empty_question_is_asked_behind_an_end_of_text(tokenizer):
    settings = CoreSettings("jeopardy", "language_modeling", 0, " ", 0.0)
    task = CoreTask(settings, [Example(("",), ("x",), 0)], tokenizer, tokenizer.eot)
    assert task.prompt(0).context.tolist() == [tokenizer.eot]


# ---- judgements, by hand ---------------------------------------------------------------------------------------------


def by_hand(task: CoreTask, model) -> list[bool]:
    """One forward pass an answer: mean loss of its tokens; for language modelling, whether each is the likeliest."""
    found = []
    for i, one in enumerate(task.examples):
        scores = naive_scores(model, [task.prompt(i)])
        if task.settings.kind == "language_modeling":
            found.append(scores[0][2])
        else:
            found.append(int(np.argmax([log_p / n for log_p, n, _ in scores])) == one.gold)
    return found


@pytest.mark.parametrize("name", list(FILES))
def test_each_kind_of_task_is_judged_as_by_hand(tasks, model, name):
    task = tasks[name]
    found = evaluate_task(task, Scorer(model, tiny.ALONE))
    assert found.outcomes["acc"].tolist() == by_hand(task, model)
    p, b = found.estimates()["acc"].value, task.settings.baseline
    assert found.estimates()["centered"].value == pytest.approx((p - b) / (1 - b))


@torch.no_grad()
def test_a_continuation_counts_when_all_its_tokens_are_the_likeliest(model, tokenizer):
    """Continuations that the model itself wrote, and ones that it did not."""
    settings = CoreSettings("jeopardy", "language_modeling", 0, " ", 0.0)
    task = CoreTask(settings, [Example(("the cat",), ("sat",), 0)] * 2, tokenizer, tokenizer.eot)
    tokens = task.asked[0][0].astype(np.int64).tolist()
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    right = np.array(tokens[-4:], dtype=np.uint32)
    task.answers = [[right], [np.append(right[:3], (right[3] + 1) % 300)]]
    assert evaluate_task(task, Scorer(model, tiny.ALONE)).outcomes["acc"].tolist() == [1.0, 0.0]


def test_options_without_a_common_beginning_are_scored_apart(model, tokenizer):
    settings = CoreSettings("winograd", "schema", 0, " ", 0.5)
    task = CoreTask(settings, [Example(("One thing", "Two"), ("is odd.",), 0)] * 3, tokenizer, tokenizer.eot)
    assert len(task.prompt(0).context) == 0
    found = Scorer(model, tiny.ALONE)(task.prompts([0]))
    for k, option in enumerate(("One thing", "Two")):
        asked = np.array(tokenizer.encode(option))
        answer = np.array(tokenizer.encode(" is odd."))
        whole = np.concatenate([asked, answer])
        logits = model(torch.from_numpy(whole[None, :-1]))[0].log_softmax(-1)
        expected = logits[len(asked) - 1 :].gather(1, torch.from_numpy(answer)[:, None]).sum()
        assert found.log_likelihood[k] == pytest.approx(expected.item(), rel=1e-12)


# ---- the metric ------------------------------------------------------------------------------------------------------


def results(names: tuple[str, ...]) -> list[Result]:
    values = np.array([1.0, 0.0, 0.0, 1.0])
    return [
        Result(f"core/{name}", {"acc": values, "centered": values * (k + 1)}, np.arange(4), 4, "")
        for k, name in enumerate(names)
    ]


def test_the_metric_is_the_mean_of_22_centred_accuracies():
    (row,) = summarize(results(TASKS), [])
    assert len(TASKS) == len(set(TASKS)) == 22
    assert (row["metric"], row["n"]) == ("centered", 22)
    assert row["value"] == pytest.approx(np.mean([0.5 * (k + 1) for k in range(22)]))
    errors = [np.std([k + 1, 0, 0, k + 1], ddof=1) / 2 for k in range(22)]
    assert row["stderr"] == pytest.approx(np.sqrt(np.square(errors).sum()) / 22)


def test_with_tasks_missing_it_has_another_name_and_says_which():
    (row,) = summarize(results(TASKS[:20]), TASKS[20:])
    assert row["metric"] == "centered_20_of_22"
    assert row["missing"] == list(TASKS[20:])


def test_a_suite_reports_its_tasks_and_what_is_missing(tmp_path, model, tokenizer):
    (suite,) = open_suites([Spec("core", str(write(tmp_path / "core")))], tokenizer)
    scorer = Scorer(model, tiny.ALONE)
    rows = suite_rows(suite, [evaluate_task(task, scorer) for task in suite.tasks])
    assert [row["task"] for row in rows] == [*(f"core/{name}" for name in FILES for _ in range(2)), "core"]
    assert rows[-1]["metric"] == "centered_3_of_22"
    assert "squad" in rows[-1]["missing"]
    assert len(rows[-1]["missing"]) == 19


# ---- malformed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "essay"}, "task 1: 'type' is 'essay', must be one of multiple_choice, schema, language_modeling"),
        ({"task": "arc_esay"}, "task 1: 'arc_esay' is not one of CORE's tasks"),
        ({"random_baseline": 1}, "task 1: 'random_baseline' is 1, must be a number from 0 to below 1"),
        ({"random_baseline": None}, "'random_baseline' is None"),
        ({"num_fewshot": -1}, "'num_fewshot' must be 0 or more"),
        ({"num_fewshot": "2"}, "'num_fewshot' is \"2\", must be a whole number"),
        ({"file": "../arc_easy.jsonl"}, "'file' null or the name of a file in the folder"),
        ({"file": "/etc/hostname"}, "'file' null or the name of a file in the folder"),
        ({"file": "a\\..\\b"}, "'file' null or the name of a file in the folder"),
        ({"type": "schema"}, "arc_easy.jsonl, line 1: the item has no 'context_options'"),
    ],
)
def test_a_malformed_entry_is_told_what_is_wrong(tmp_path, tokenizer, changes, said):
    with pytest.raises(UserError, match=said):
        open_core(write(tmp_path / "core", **changes), tokenizer, tokenizer.eot)


def test_a_folder_that_is_none_of_cores_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"holds no core.json; give the folder that does"):
        open_core(tmp_path, tokenizer, tokenizer.eot)
    for content, said in (("{", "not JSON"), ('{"a": 1}', "not a list of tasks"), ("[]", "names no file that exists")):
        (tmp_path / "core.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            open_core(tmp_path, tokenizer, tokenizer.eot)


# ---- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.shared
@needs_shared
def test_pieces_encoded_apart_are_the_prompt_encoded_whole():
    """Of every task, some items: tokens never cross the line break between examples, nor the space before an answer."""
    from regpt.text.gpt2 import load_gpt2

    gpt2 = load_gpt2()
    tasks, missing = open_core(SHARED, gpt2, gpt2.eot)
    assert missing == ["squad", "coqa"]
    assert len(tasks) == 20
    for task in tasks:
        for i in range(0, task.n_items, task.n_items // 5):
            for before, answer in texts(task, i, gpt2):  # type: ignore[arg-type]
                context, endings, _ = task.prompt(i)
                whole = {tuple(np.concatenate([context, ending]).tolist()) for ending in endings}
                assert tuple(gpt2.encode(before + answer)) in whole, (task.name, i)


# ---- a selection, and tasks in trouble -------------------------------------------------------------------------------


def test_a_selection_is_read_from_the_folder_in_its_path(tmp_path, tokenizer):
    folder = write(tmp_path / "core")
    for given, chosen in (
        (f"{folder}/arc_easy,jeopardy", ["arc_easy", "jeopardy"]),
        (f"{folder}/winograd", ["winograd"]),
    ):
        (suite,) = open_suites([Spec("core", given)], tokenizer)
        assert [task.name for task in suite.tasks] == [f"core/{name}" for name in chosen]
        ones = [Result(f"core/{name}", {"centered": np.ones(2)}, np.arange(2), 2, "") for name in chosen]
        (row,) = suite.summarize(ones)
        assert (row["metric"], "missing" in row) == (f"centered_{len(chosen)}_of_22", False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("core/arc_eazy", "holds no CORE task 'arc_eazy' .did you mean 'arc_easy'.*choose from arc_easy, winograd"),
        ("core/squad", "holds no CORE task 'squad'"),  # in core.json, without a file
        ("core/arc_easy,winograd,arc_easy", "names a task twice"),
        ("core,piqa", "task 'piqa' follows all of CORE; choose some tasks with core:.*core/piqa"),
    ],
)
def test_a_wrong_selection_is_refused(tmp_path, tokenizer, given, said):
    write(tmp_path / "core")
    with pytest.raises(UsageError, match=said):
        open_suites([Spec("core", f"{tmp_path}/{given}")], tokenizer)


def test_a_damaged_file_of_one_task_leaves_the_others(tmp_path, tokenizer):
    folder = write(tmp_path / "core")
    (folder / "winograd.jsonl").write_text('{"context_options": 5}\n', encoding="utf-8")
    said = []
    (suite,) = open_suites([Spec("core", str(folder))], tokenizer, tolerate=lambda *one: said.append(one))
    assert [task.name for task in suite.tasks] == ["core/arc_easy", "core/jeopardy"]
    assert [name for name, _ in said] == ["core/winograd"]
    assert "winograd" in suite.summarize([])[0]["missing"]
    with pytest.raises(UserError, match=r"winograd\.jsonl, line 1"):
        open_suites([Spec("core", str(folder))], tokenizer)


def test_a_task_without_a_scored_item_counts_as_missing():
    scored = Result("core/piqa", {"centered": np.ones(2)}, np.arange(2), 2, "", left_out=0)
    none = Result("core/copa", {"centered": np.ones(0)}, np.arange(0), 3, "", left_out=3)
    (row,) = summarize([scored, none], ["squad"])
    assert (row["metric"], row["value"], row["n"]) == ("centered_1_of_22", 1.0, 1)
    assert (row["missing"], row["left_out"]) == (["squad", "copa"], 3)
