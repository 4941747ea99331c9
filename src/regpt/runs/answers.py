"""A file of conversations → the task of its held-out answers, with examples of its other part and retrieved passages.

What is held out is what `regpt finetune --val-fraction` holds out, so a model that was tuned on the file is measured on
what it has not seen, and every other model on the same answers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt.console.text import counted
from regpt.errors import UserError
from regpt.evals.answers import AnswerSuite, AnswerTask, Extras, Retrieve
from regpt.files import is_file
from regpt.prepare.conversations import ConversationReader, Messages, question_fraction
from regpt.prepare.passages import PassageIndex
from regpt.text.chat import ChatTemplate


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What stands before the questions, and which are asked.

    Attributes:
        few_shot: examples of the training part before each question.
        seed: of the draws of these.
        retrieve: file, folder or address whose passages are searched; empty retrieves nothing.
        passages: how many of them stand before a question.
        with_answers: do not pass over passages that hold the answer.
        val_fraction: of the conversations, held out; 1 asks all.
    """

    few_shot: int = 0
    seed: int = 0
    retrieve: str = ""
    passages: int = 3
    with_answers: bool = False
    val_fraction: float = 0.05


def open_answers(name: str, file: str, template: ChatTemplate, longest: int, options: AnswerOptions) -> AnswerSuite:
    """The suite of the answers in `file`.

    Raises:
        UserError: a file that cannot be read, nothing held out or nothing to draw examples from, no answer that fits;
            what `PassageIndex` raises.
    """
    if not is_file(file):
        raise UserError(f"{file!r} is not a file; give a file of conversations, conversations:FILE")
    reader = ConversationReader([Path(file)], skip=True)
    read = [one.messages for one in reader]
    held_out = [one for one in read if question_fraction(one) < options.val_fraction]
    rest = [one for one in read if question_fraction(one) >= options.val_fraction]
    if not held_out or (options.few_shot and not rest):
        what = "all are held out, so no example is left" if held_out else "none is held out"
        raise UserError(
            f"of {counted(len(read), 'conversation')} in {file} {what} at --val-fraction {options.val_fraction:g}; "
            "give another fraction"
        )
    notes = [f"{counted(reader.skipped, 'row')} skipped, the first: {reader.reasons[0]}"] if reader.skipped else []
    retrieve = None
    if options.retrieve:
        index = PassageIndex(options.retrieve)
        notes += [index.sentence()]
        retrieve = retriever(index, options)
    extras = Extras(lambda item: examples(rest, item, options), retrieve)
    task = AnswerTask(name, held_out, template, longest, extras)
    if not task.n_items:
        raise UserError(f"every held-out conversation of {file} is longer than {longest:,} tokens; use a longer model")
    asked = f"{counted(len(held_out), 'conversation')} of {len(read):,} held out"
    return AnswerSuite(task, [f"{asked}, {counted(task.n_items, 'answer')}", *notes])


def examples(conversations: Sequence[Messages], item: int, options: AnswerOptions) -> Sequence[Messages]:
    """The examples of an item: the first question and answer of conversations that the seed and its number draw."""
    draw = random.Random(f"{options.seed}:{item}")
    chosen = draw.sample(conversations, min(options.few_shot, len(conversations)))
    turns = [[one for one in messages if one["role"] != "system"] for messages in chosen]
    return [turn[: 1 + next(i for i, one in enumerate(turn) if one["role"] == "assistant")] for turn in turns]


def retriever(index: PassageIndex, options: AnswerOptions) -> Retrieve:
    """Passages for a question; none of held-out conversations and none that holds its answer, unless wanted."""
    if options.with_answers:
        return lambda question, answer: index.search(question, options.passages)
    return lambda question, answer: index.search(question, options.passages, options.val_fraction, answer)
