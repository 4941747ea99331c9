"""The conversations that ship with regpt: valid rows, right sums, nothing of the tasks' test, small."""

import re
from pathlib import Path

from regpt.evals.chat.everyday import conversation_lines, everyday_conversations
from regpt.evals.chat.items import split_of
from regpt.evals.chat.tasks import CHAT_TASKS, ChatOptions, make_items
from regpt.prepare.conversations import ConversationReader, check_messages

FOUND = everyday_conversations()
TURNS = [(one[i]["content"], one[i + 1]["content"]) for one in FOUND for i in range(0, len(one), 2)]


def test_every_conversation_is_a_row_that_finetune_reads(tmp_path: Path):
    for messages in FOUND:
        check_messages([dict(one) for one in messages])
    path = tmp_path / "everyday.jsonl"
    path.write_text(conversation_lines(FOUND[:50]), encoding="utf-8")
    assert [one.messages for one in ConversationReader([path])] == FOUND[:50]
    assert len(conversation_lines(FOUND).encode()) < 1_000_000
    assert FOUND == everyday_conversations() != everyday_conversations(seed=1)


def test_what_a_table_fills_in_leaves_no_mark():
    assert not [turn for turn in TURNS if re.search(r"\$[a-zA-Z]|  |^\s|\s$", "".join(turn))]
    assert ("What color is the sky?", "The sky is blue.") in TURNS
    assert "- apple\n- banana\n- pear" in dict(TURNS)["Name three fruits"]


def test_a_question_has_one_meaning():
    """Of the hand-written ones: replies differ in wording alone, such as in a greeting or `Paris.`"""
    replies: dict[str, set[str]] = {}
    for asked, reply in TURNS:
        replies.setdefault(asked, set()).add(reply)
    del replies["What is my name?"]  # depends on what was said before
    assert {asked: all_ for asked, all_ in replies.items() if len(all_) > 1} == {}


def test_sums_are_right_and_none_is_of_the_test():
    sums = [turn for turn in TURNS if re.search(r"\d (\+|plus) \d|Add \d+ and \d", turn[0])]
    assert len(sums) > 400
    for asked, reply in sums:
        a, b = sorted(map(int, re.findall(r"\d+", asked)))
        assert int(re.findall(r"\d+", reply)[-1]) == a + b
        assert split_of("addition", (a, b)) == "train"
    asked = {asked for asked, _ in TURNS}
    for task in CHAT_TASKS:
        assert not asked & {item.question for item in make_items(ChatOptions(task, 1, 30), "test")}
