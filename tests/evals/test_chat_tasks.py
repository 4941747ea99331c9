"""Generated questions and their checkers: right replies pass, changed ones fail, no item is of both splits."""

import json
import re
import subprocess
import sys
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import UsageError
from regpt.evals.chat.instructions import INSTRUCTIONS, followed, followed_loosely
from regpt.evals.chat.items import ChatItem, split_of
from regpt.evals.chat.tasks import CHAT_TASKS, IFEVAL, ChatOptions, check_reply, make_item, make_items
from regpt.evals.specs import parse_tasks
from regpt.prepare.conversations import ConversationReader

TWELVE = [task for task in CHAT_TASKS if task != IFEVAL]


@st.composite
def items(draw, tasks=tuple(CHAT_TASKS), split=None) -> ChatItem:
    task = draw(st.sampled_from(tasks))
    seed, index = draw(st.integers(0, 2**31)), draw(st.integers(0, 10**6))
    difficulty = draw(st.integers(1, CHAT_TASKS[task].hardest))
    return make_item(task, seed, index, difficulty, split or draw(st.sampled_from(["train", "test"])))


def test_there_are_twelve_tasks_and_twenty_instructions():
    assert (len(TWELVE), len(INSTRUCTIONS)) == (12, 20)


@given(items())
@settings(max_examples=400, deadline=None)
def test_the_reference_answer_is_right_and_nothing_and_other_texts_are_not(item):
    assert check_reply(item, item.answer)
    for wrong in ("", " ", "I do not know."):
        if item.task != IFEVAL or not wrong.strip():
            assert not check_reply(item, wrong)


@given(items(tasks=tuple(TWELVE)), st.data())
@settings(max_examples=400, deadline=None)
def test_an_answer_with_one_character_changed_added_or_lost_is_wrong(item, data):
    text = item.answer
    start = text.rindex("#### ") + 5 if item.task == "problems" else 0  # steps are free; the number counts
    at = data.draw(st.integers(start, len(text) - 1))
    kind = data.draw(st.sampled_from(["change", "add", "lose"]))
    other = "7" if text[at] != "7" else "8"
    changed = text[:at] + {"change": other, "add": other + text[at], "lose": ""}[kind] + text[at + 1 :]
    same = changed.strip() == text.strip()
    spaces = item.task in ("sorting", "json") and kind == "lose" and text[at] == " " and '"' not in changed[at - 1 : at]
    same |= spaces and (item.task == "sorting" or parsed(changed) == parsed(text))
    assert check_reply(item, changed) == same, (text, changed)


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@given(items(tasks=("addition", "subtraction", "multiplication", "chains", "problems")))
@settings(max_examples=150, deadline=None)
def test_sums_are_right_by_another_way_of_computing_them(item):
    if item.task == "problems":
        for line in item.answer.splitlines()[:-1]:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert item.answer.splitlines()[-2].endswith(f"= {item.answer.rpartition('#### ')[2]}")
        assert item.answer.count("=") == item.difficulty
    else:
        asked = re.fullmatch(r"What is ([0-9 +*-]+)\? Answer with the number alone\.", item.question)
        assert asked
        assert eval(asked[1]) == int(item.answer)


@given(items(tasks=("syllogisms",)))
@settings(max_examples=150, deadline=None)
def test_a_syllogism_follows_where_a_walk_along_its_premises_arrives(item):
    *pairs, (start, end) = re.findall(r"[Aa]ll (\w+) are (\w+)", item.question)
    seen, new = set(), {start}
    while new:
        seen |= new
        new = {b for a, b in pairs if a in seen} - seen
    assert item.answer == ("yes" if end in seen else "no")


@given(items(tasks=("counting", "reversing", "sorting", "copying", "dates", "json")))
@settings(max_examples=200, deadline=None)
def test_other_answers_are_right_by_what_the_question_says(item):
    quoted, numbers = re.findall(r'"([^"]+)"', item.question), re.findall(r"\d+", item.question)
    if item.task == "counting":
        assert int(item.answer) == sum(one == quoted[0] for one in quoted[1])
    elif item.task == "reversing":
        assert [*item.answer] == [*reversed(quoted[0])]
    elif item.task == "sorting":
        found = [int(one) for one in item.answer.split(", ")]
        assert sorted(found) == sorted(map(int, numbers))
        assert found == sorted(found) or ("from largest" in item.question and found[::-1] == sorted(found))
    elif item.task == "copying":
        assert item.question.endswith(f": {item.answer}")
    elif item.task == "dates":
        days, year, month, day = map(int, numbers)
        off = (date.fromisoformat(item.answer) - date(year, month, day)).days
        assert off == (days if " after " in item.question else -days)
    else:
        said = dict(re.findall(r"(\w+) is (?:the text |the number )?(\w+)", item.question))
        assert {
            key: str(x) if isinstance(x, str) else json.dumps(x) for key, x in json.loads(item.answer).items()
        } == said


@pytest.mark.parametrize("task", CHAT_TASKS)
def test_no_item_of_the_test_is_ever_made_for_training(task):
    for difficulty in (1, 2, 3):
        test = {one.question for one in make_items(ChatOptions(task, difficulty, 60), "test")}
        train = {make_item(task, seed, i, difficulty, "train").question for seed in (0, 7) for i in range(250)}
        assert test
        assert not test & train
        for item in make_items(ChatOptions(task, difficulty, 60), "test"):
            assert split_of(task, item.operands) == "test"


def test_a_sum_is_of_the_split_of_the_same_sum_the_other_way_round():
    sums = [make_item("addition", 0, i, 1) for i in range(400)]
    train = {item.question for item in sums}
    for i in range(100):
        a, b = make_item("addition", 1, i, 1, "test").operands
        assert not {f"What is {x} + {y}? Answer with the number alone." for x, y in ((a, b), (b, a))} & train


@given(items())
@settings(max_examples=60, deadline=None)
def test_an_item_is_a_function_of_its_numbers(item):
    split = split_of(item.task, item.operands)
    assert make_item(item.task, item.seed, item.index, item.difficulty, split) == item


GOLDEN = {"addition": "11", "dates": "2016-04-01", "problems": "10 - 8 = 2\n#### 2", "reversing": "niyp"}


def test_items_are_the_same_as_when_they_were_first_made():
    """Scores of different versions can be compared."""
    found = {task: make_item(task, 0, 0, 1, "test").answer for task in ("addition", "reversing", "dates", "problems")}
    assert found == GOLDEN


def test_larger_parts_contain_smaller_ones_and_no_item_twice():
    few, many = (make_items(ChatOptions("counting", 1, n), "test") for n in (20, 50))
    assert many[:20] == few
    assert len({one.question for one in many}) == 50
    assert 0 < len(make_items(ChatOptions("addition", 1, 1000), "test")) < 20, "so few one-digit sums are in the test"


def test_the_difficulty_makes_questions_longer():
    for task in TWELVE:
        sizes = [sum(len(make_item(task, 0, i, d).question) for i in range(40)) for d in (1, 5, 10)]
        assert sizes[0] < sizes[1] < sizes[2] or task == "dates", task


@pytest.mark.parametrize(
    ("task", "given", "right"),
    [
        ("addition", "1,234", True),
        ("addition", " 1234.\n", True),
        ("addition", "12,34", False),
        ("addition", "The sum is 1234", False),
        ("problems", "I think.\n####1,234", True),
        ("problems", "#### 1234\nSure?", False),
        ("problems", "1234", False),
        ("json", '{"b":1,"a":"x"}', True),
        ("json", '{"a": "x", "b": 1, "a": "x"}', False),
        ("json", '{"a": "x", "b": true}', False),
        ("json", '{"a": "x", "b": 1.0}', False),
        ("json", "[" * 100_000, False),
        ("syllogisms", "Yes.", True),
        ("syllogisms", "yes and no", False),
        ("sorting", "1,2, 3.", True),
        ("sorting", "1 2 3", False),
    ],
)
def test_what_a_checker_allows(task, given, right):
    answers = {"json": '{"a": "x", "b": 1}', "problems": "1230 + 4 = 1234\n#### 1234", "syllogisms": "yes"}
    answer = answers.get(task, "1, 2, 3" if task == "sorting" else "1234")
    assert check_reply(ChatItem(task, "", answer, (), 0, 0, 1), given) == right


FOLLOWED = [
    ("min_words", {"n": 3}, "one two three", "one two"),
    ("max_words", {"n": 3}, "one two three", "one two three four"),
    ("sentences", {"n": 2}, "One. Is it two?", "One. Two! Three"),
    ("paragraphs", {"n": 2}, "a\n\n\nb", "a\nb"),
    ("bullets", {"n": 2}, "* a\n  - b", "* a\n*b"),
    ("include", {"x": "stone"}, "A Stone!", "stones"),
    ("count", {"x": "stone", "n": 2}, "stone, STONE", "stone stone stone"),
    ("exclude", {"x": "good"}, "goods", "Good."),
    ("no_commas", {}, "a; b", "a, b"),
    ("start", {"x": "In short:"}, " In short: a", "so In short: a"),
    ("end", {"x": "That is all."}, "a That is all.\n", "That is all. a"),
    ("title", {}, "a <<My title>> b", "<< >> <title>"),
    ("postscript", {}, "a\nP.S. b", "a P.S. b"),
    ("capitals", {"n": 2}, "AB and CD", "A and CD"),
    ("lowercase", {}, "a, 1", "aB"),
    ("uppercase", {}, "A, 1", "AbC"),
    ("quotation", {}, ' "a b" ', '"a" b'),
    ("json", {}, '```json\n{"a": 1}\n```', '{"a": 1} there'),
    ("repeat", {}, "Q? and A", "and A"),
    ("script", {"x": "Greek"}, "ναι, 1", "ναι yes"),
]


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), FOLLOWED, ids=[one[0] for one in FOLLOWED])
def test_an_instruction_is_followed_or_not(name, arguments, right, wrong):
    assert followed([(name, arguments)], "Q?", right) == [True]
    assert followed([(name, arguments)], "Q?", wrong) == [False]
    assert followed([(name, arguments)], "Q?", " \n") == [False]
    assert {one[0] for one in FOLLOWED} == set(INSTRUCTIONS)


@given(items(tasks=(IFEVAL,)))
@settings(max_examples=200, deadline=None)
def test_a_request_has_as_many_instructions_as_its_difficulty_of_different_families(item):
    families = [INSTRUCTIONS[name].family for name, _ in item.rules]
    assert len(set(families)) == len(families) == item.difficulty
    assert all(INSTRUCTIONS[name].said.format(**arguments) in item.question for name, arguments in item.rules)


def test_the_loose_score_ignores_an_introduction_an_ending_and_emphasis():
    rules = [("lowercase", {}), ("no_commas", {}), ("start", {"x": "In short:"})]
    assert followed(rules, "", "Sure, here:\n**in** short") == [False, False, False]
    assert followed_loosely(rules, "", "Sure, here:\n**in** short") == [True, True, False]
    assert followed_loosely(rules, "", "Sure:\n*In short: yes*\nBye, all") == [False, True, True]
    assert followed_loosely(rules[1:2], "", "Sure, here:\nyes\nBye, all") == [True]
    assert followed_loosely(rules, "", "") == [False, False, False]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("chat", "task 'chat' needs to know which; give chat:TASK"),
        ("chat:additon", "chat has no task 'additon' .did you mean 'addition'.*; choose from addition, "),
        ("chat:addition:digits=2", "no option 'digits=2'.*; it has difficulty, items, seed, tokens"),
        ("chat:addition:difficulty=11", "difficulty of chat:addition is '11', must be a whole number from 1 to 10"),
        ("chat:ifeval:difficulty=4", "must be a whole number from 1 to 3"),
        ("chat:addition:items=many", "items of chat:addition is 'many'"),
        ("chat:addition:seed=1:seed=2", "seed of chat:addition is given twice"),
        ("chat:addition,chat:addition", "task 'chat:addition' is given twice"),
    ],
)
def test_what_is_no_chat_task_is_refused(typed, said):
    with pytest.raises(UsageError, match=said):
        parse_tasks(typed)


def test_generators_and_checkers_need_no_torch():
    code = "import sys, regpt.evals.chat.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_items_are_conversations_that_finetune_reads(tmp_path):
    path = tmp_path / "items.jsonl"
    found = [make_item(task, 0, 0) for task in CHAT_TASKS]
    path.write_text("".join(item.line() for item in found), encoding="utf-8")
    read = [one.messages for one in ConversationReader([path])]
    assert [(a["content"], b["content"]) for a, b in read] == [(one.question, one.answer) for one in found]
    row = json.loads(found[0].line())
    assert make_item(row["task"], row["seed"], row["index"], row["difficulty"]) == found[0]
