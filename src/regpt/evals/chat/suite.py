"""Replies of a model to chat items: written by the engine, judged by the checkers, and how they end."""

import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from regpt.engine.generate import engine_for
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits
from regpt.errors import UserError
from regpt.evals.chat.instructions import followed, followed_loosely
from regpt.evals.chat.items import ChatItem
from regpt.evals.chat.tasks import CHAT_TASKS, IFEVAL, ChatOptions, check_reply, make_items
from regpt.evals.items import hash_of
from regpt.evals.score import Scorer
from regpt.evals.suite import ShowProgress, Suite
from regpt.evals.task import Result, estimate, with_interval
from regpt.text.chat import ChatTemplate

GREEDY = SamplingOptions(top_k=1)
NGRAM = 4
# Role words at the start of a line, as templates write them; special tokens are found as tokens.
ROLES = re.compile(
    r"^\s*(?:<\|[a-z_]+\|>|\[/?INST\]|(?:user|human|assistant|system|tool)\s*(?::|$))", re.MULTILINE | re.IGNORECASE
)


class Reply(NamedTuple):
    """Tokens of a reply, without the one that ended it, its text, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams of tokens that occurred earlier in the reply; 0 of fewer than four tokens."""
    grams = list(zip(*(ids[k:] for k in range(NGRAM))))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def leaks_role(reply: Reply, template: ChatTemplate) -> bool:
    """Whether a reply has a special token other than its end, or a role at the start of a line."""
    return bool(set(reply.ids) & set(template.special.values())) or ROLES.search(reply.text) is not None


def judge(item: ChatItem, reply: Reply, template: ChatTemplate) -> dict[str, float]:
    """Metric → the contribution of one reply."""
    if item.task == IFEVAL:
        strict = followed(item.rules, item.question, reply.text)
        loose = followed_loosely(item.rules, item.question, reply.text)
        found = {"prompt_strict": all(strict), "prompt_loose": all(loose)}
        found |= {"instruction_strict": np.mean(strict), "instruction_loose": np.mean(loose)}
    else:
        found = {"acc": check_reply(item, reply.text)}
    found |= {"ended": reply.ended, "role_leak": leaks_role(reply, template)}
    found |= {"repetition": repetition(reply.ids), "reply_tokens": len(reply.ids) + reply.ended}
    return {metric: float(value) for metric, value in found.items()}


class ChatSuite(Suite):
    """A chat task: its items of the test, asked with the model's template and answered greedily."""

    def __init__(self, options: ChatOptions, template: ChatTemplate):
        super().__init__(options.name, ())
        started = time.perf_counter()
        self.options, self.template = options, template
        self.items = make_items(options, "test")
        self.prompts = [template.encode([{"role": "user", "content": one.question}]) for one in self.items]
        self.seconds = time.perf_counter() - started

    def evaluate(self, scorer: Scorer, show: ShowProgress, max_items: int) -> list[Result]:
        """The result on the first `max_items` (0: all) that leave room for a reply; processes share them.

        Raises:
            UserError: no question leaves room, or logits that are not finite.
        """
        started, longest, mesh = time.perf_counter(), scorer.max_seq_len, scorer.mesh
        asked = len(self.items) if not max_items else min(max_items, len(self.items))
        fits = [i for i in range(asked) if len(self.prompts[i]) < longest]
        if not fits:
            raise UserError(
                f"every question of {self.name} is longer than the {longest:,} tokens that the model reads; choose a "
                "smaller difficulty, or use a model with longer sequences"
            )
        mine = fits[mesh.rank :: mesh.world_size]
        with show(self.name) as progress:
            size, n = mesh.world_size, len(fits)
            replies = self.replies(scorer, mine, lambda done: progress(min(done * size, n), n))
        judged = [judge(self.items[i], reply, self.template) for i, reply in zip(mine, replies)]
        names = list(judge(self.items[0], Reply([], "", False), self.template))
        values = torch.zeros(len(names), len(fits), dtype=torch.float64)
        for i, one in zip(mine, judged):
            values[:, fits.index(i)] = torch.tensor([one[name] for name in names], dtype=torch.float64)
        outcomes = dict(zip(names, mesh.total(values).numpy()))
        spent = time.perf_counter() - started
        items_sha256 = hash_of([one.question, one.answer] for one in self.items)
        baseline = CHAT_TASKS[self.options.task].baseline
        facts = (len(self.items), items_sha256, baseline, spent, 0, asked - len(fits))
        metrics = {name: with_interval(found) for name, found in outcomes.items() if name != "reply_tokens"}
        metrics |= {"reply_tokens": estimate(outcomes["reply_tokens"])}
        return [Result(self.name, outcomes, np.array(fits), *facts, metrics=metrics)]

    def replies(self, scorer: Scorer, numbers: Sequence[int], progress: Callable[[int], None]) -> list[Reply]:
        """The model's reply to each of these items."""
        if not numbers:
            return []
        most = self.options.tokens or CHAT_TASKS[self.options.task].tokens
        prompts = [self.prompts[i] for i in numbers]
        stops = self.template.stop_ids
        requests = [Request(one, min(most, scorer.max_seq_len - len(one)), GREEDY, stop_ids=stops) for one in prompts]
        found: list[list[int]] = [[] for _ in requests]
        done = 0
        with scorer.autocast():
            engine = engine_for(scorer.model, requests)
            places = {engine.submit(request): k for k, request in enumerate(requests)}
            while engine.busy:
                for event in engine.step():
                    if event.finish_reason == "error":
                        raise bad_logits()
                    if event.token is not None:
                        found[places[event.request]].append(event.token)
                    done += event.finish_reason is not None
                progress(done)
        return [self.reply(ids, stops) for ids in found]

    def reply(self, ids: list[int], stops: Sequence[int]) -> Reply:
        ended = bool(ids) and ids[-1] in stops
        ids = ids[:-1] if ended else ids
        return Reply(ids, self.template.tokenizer.decode(ids), ended)
