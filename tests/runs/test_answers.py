"""`regpt eval --tasks conversations:FILE`: losses of held-out answers, by hand; examples and passages before them."""

import json
from pathlib import Path

import pytest
import torch

import regpt
from regpt.checkpoint.open import open_model
from regpt.cli.eval import main
from regpt.errors import UsageError, UserError
from regpt.evals.answers import AnswerTask, Extras
from regpt.prepare.conversations import ConversationReader, question_fraction
from regpt.prepare.passages import PassageIndex
from regpt.runs.answers import AnswerOptions, examples
from regpt.text.bpe import byte_tokenizer
from regpt.text.chat import PLAIN, ChatTemplate

ENCODE, END = byte_tokenizer().encode, byte_tokenizer().eot
FRACTION = 0.2  # eight of forty or so


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


def measured(base: Path, answers: Path, **options) -> dict:
    rows = regpt.evaluate(base, f"conversations:{answers}", device="cpu", val_fraction=FRACTION, **options)
    assert [row["metric"] for row in rows] == ["loss", "bpb"]
    return rows[0]


def by_hand(base: Path, answers: Path, before) -> tuple[float, int]:
    """Mean loss of the answers' bytes and their ends, each after a text that `before(item, question)` gives."""
    opened = open_model(str(base))
    total, count, item = 0.0, 0, 0
    for one in ConversationReader([answers]):
        if question_fraction(one.messages) >= FRACTION:
            continue
        question, said = (message["content"] for message in one.messages)
        prompt = [END, *before(item, question)]
        ids = [*prompt, *ENCODE(said), END]
        with torch.no_grad():
            log_p = opened.model(torch.tensor([ids[:-1]]))[0, :, :257].double().log_softmax(-1)
        total -= sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        count, item = count + len(ids) - len(prompt), item + 1
    return total / count, count


def turn(question: str) -> list[int]:
    return ENCODE(f"User:\n{question}\n\nAssistant:\n")


def test_the_loss_is_that_of_the_answers_after_the_plain_template(base, answers):
    loss, tokens = by_hand(base, answers, lambda item, question: turn(question))
    found = measured(base, answers)
    assert found["value"] == pytest.approx(loss, rel=1e-6)
    assert (found["tokens"], found["examples"]) == (tokens, 0)
    assert found["stderr"] > 0


def test_examples_are_turns_of_the_other_part_drawn_for_each_question(base, answers):
    rest = [one.messages for one in ConversationReader([answers]) if question_fraction(one.messages) >= FRACTION]
    options = AnswerOptions(few_shot=1, seed=5)
    drawn = [examples(rest, item, options)[0] for item in range(20)]
    assert len({one[0]["content"] for one in drawn}) > 5
    assert all(one in rest for one in drawn)

    def before(item: int, question: str) -> list[int]:
        shown, said = (message["content"] for message in drawn[item])
        return [*turn(shown), *ENCODE(said), END, *turn(question)]

    loss, _ = by_hand(base, answers, before)
    found = measured(base, answers, few_shot=1, seed=5)
    assert found["value"] == pytest.approx(loss, rel=1e-6)
    assert found["examples"] == found["examples_used"] == found["n"]
    assert measured(base, answers, few_shot=1, seed=6)["value"] != found["value"]


def test_passages_stand_before_the_question_without_held_out_rows(base, answers):
    index = PassageIndex(str(answers))

    def before(item: int, question: str) -> list[int]:
        ((one,), _) = index.search(question, 1, held_out=FRACTION)
        return turn(f"[1] {one.text}\n\n{question}")

    loss, _ = by_hand(base, answers, before)
    found = measured(base, answers, retrieve=str(answers), passages=1)
    assert found["value"] == pytest.approx(loss, rel=1e-6)
    assert found["passages"] == found["passages_used"] == found["n"]
    assert found["passed_over"] >= found["n"]  # each question's own row is the best one
    own = measured(base, answers, retrieve=str(answers), passages=1, with_answers=True)
    assert own["passed_over"] == 0
    assert own["value"] != found["value"]


def test_what_does_not_fit_is_left_out_and_counted(base, answers, capsys):
    given = ["--few-shot", "9", "--retrieve", str(answers), "--passages", "2", "--val-fraction", str(FRACTION)]
    assert main([str(base), "--tasks", f"conversations:{answers}", *given, "--seq-len", "90", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "of 2.00 a question fit, the others were left out" in said
    assert "examples: 0.00 of 9.00 a question fit" in said
    assert "better passages were passed over: held-out conversations, or the answer itself" in said


def test_a_prompt_is_never_longer_than_the_model_and_each_extra_that_fits_is_there():
    template = ChatTemplate(PLAIN, byte_tokenizer())
    short, long = ([{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}] for n in (4, 200))
    asked = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "c"},
    ]
    task = AnswerTask("x", [asked, long], template, 100, Extras(lambda item: [long, short, short, short]))
    assert (task.n_items, task.left_out) == (1, 1)
    ((context, (ending,), _),) = task.prompts([0])
    text = byte_tokenizer().decode([*context.tolist(), *ending.tolist()])
    assert text.count("aaaa") == 2
    assert "aaaaa" not in text
    assert text.startswith("<|endoftext|>System:\ns\n\nUser:\naaaa")
    assert len(context) + len(ending) <= 100
    assert task.extras.counts == {"examples": 4, "examples_used": 2}


def test_items_and_json_have_the_losses_and_counts(base, answers, tmp_path, capsys):
    given = [str(base), "--tasks", f"conversations:{answers}", "--val-fraction", str(FRACTION), "--device", "cpu"]
    assert main([*given, "--json", str(tmp_path / "a.json"), "--items", str(tmp_path / "items")]) == 0
    task = json.loads((tmp_path / "a.json").read_text())["tasks"][f"conversations:{answers}"]
    (file,) = (tmp_path / "items").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokens = sum(row["tokens"] for row in rows)
    assert task["metrics"]["loss"]["tokens"] == tokens
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    assert task["metrics"]["loss"]["value"] == pytest.approx(loss, rel=1e-12)
    assert f"conversations of 40 held out, {len(rows)} answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"passages": 2}, UsageError, "passages would change nothing without retrieve FOLDER"),
        ({"seed": 2}, UsageError, "seed would change nothing without few_shot K"),
        ({"val_fraction": 0.0}, UsageError, "val_fraction is 0, must be above 0 and at most 1"),
        ({"val_fraction": 1e-9}, UserError, "of 40 conversations in .* none is held out at val_fraction 1e-09"),
        ({"val_fraction": 1.0, "few_shot": 1}, UserError, "all are held out, so no example is left"),
        ({"seq_len": 20}, UserError, "every held-out conversation of .* is longer than 20 tokens"),
        ({"retrieve": "nowhere"}, UserError, "no file matches 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(base, answers, options, error, said):
    with pytest.raises(error, match=said):
        regpt.evaluate(base, f"conversations:{answers}", device="cpu", **{"val_fraction": FRACTION, **options})


def test_options_of_conversations_need_the_task(base):
    with pytest.raises(UsageError, match="few_shot would change nothing without the task conversations"):
        regpt.evaluate(base, "mc:x.jsonl", few_shot=2)
    with pytest.raises(UserError, match=r"'x\.jsonl' is not a file; give a file of conversations"):
        regpt.evaluate(base, "conversations:x.jsonl", device="cpu")
