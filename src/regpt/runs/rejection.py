"""Rejection sampling: of several replies to each prompt the best is kept, as a conversation to be tuned on.

Prompts are answered in their order and a line is appended when they are done, so a command that was killed goes on
after its last line.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regpt.checkpoint.open import OpenModel, open_model
from regpt.console.drawing import progress_bar
from regpt.data.order import splitmix64
from regpt.engine.engine import PAGE_SIZE, Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits
from regpt.errors import UsageError, UserError
from regpt.evals.chat.tasks import chat_options, check_reply, make_items
from regpt.structured import parse_row
from regpt.text.chat import CONTEXT, ChatTemplate
from regpt.text.folder import CHAT

MOST_ROWS = 256  # replies that are written at once
TASK = "chat:"

Judge = Callable[[int, Sequence[str]], list[float]]  # (number of the prompt, replies) → their rewards


@dataclass(frozen=True)
class BestOf:
    """What is asked.

    Attributes:
        k: replies to each prompt.
        reward: a run that was trained by preference.method = reward, or chat:TASK, whose questions are the prompts.
        file: where the conversations are appended.
        prompts: what users say; empty with a task.
    """

    k: int
    reward: str
    file: Path
    prompts: tuple[str, ...]
    max_new_tokens: int
    options: SamplingOptions
    seed: int


class BestReply(NamedTuple):
    """Of one prompt: its number, its replies' rewards (None for one that did not end by itself), the kept reply."""

    number: int
    scores: list[float | None]
    kept: int | None
    text: str


def keep_best(opened: OpenModel, asked: BestOf) -> str:
    """Write the best replies to `asked.file`; what came of it, as a sentence.

    Raises:
        UsageError: a task or a count that is not allowed.
        UserError: no template, no head for rewards, another tokenizer or template, a reward that is not finite, a file
            that was written with other settings.
    """
    template = template_of(opened)
    prompts, judge, least, reward_sha256 = open_judge(asked, template, opened)
    said = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    made = {"model": opened.source, "model_sha256": opened.weights_sha256, "template_sha256": template.sha256}
    made |= {"reward": asked.reward, "reward_sha256": reward_sha256, "prompts_sha256": said, "best_of": asked.k}
    made |= {"seed": asked.seed, "max_new_tokens": asked.max_new_tokens, **asdict(asked.options)}
    made = json.loads(json.dumps(made))
    first, kept = resumed(asked.file, made)
    asked.file.parent.mkdir(parents=True, exist_ok=True)
    with asked.file.open("ab") as file, progress_bar(transient=True) as bar:
        task, began = bar.add_task("reading prompts", total=len(prompts), completed=first), time.perf_counter()
        for one in judged(opened, template, asked, prompts, first, judge):
            if one.kept is not None and (score := one.scores[one.kept]) is not None and score >= least:
                messages = [{"role": "user", "content": prompts[one.number]}]
                messages += [{"role": "assistant", "content": one.text}]
                row = {"messages": messages, "number": one.number, "score": score, "kept": one.kept}
                line = json.dumps(row | {"scores": one.scores, "made": made}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
                file.flush()
                kept += 1
            rate = (one.number + 1 - first) * asked.k / (time.perf_counter() - began)
            bar.update(task, completed=one.number + 1, description=f"{kept:,} kept  {rate:,.1f} replies/s")
    none = len(prompts) - kept
    left = f"; {none:,} had no reply that ended by itself" + " and was right" * (least > 0) if none else ""
    return f"the best of {asked.k} replies to {kept:,} of {len(prompts):,} prompts is in {asked.file}{left}"


def template_of(opened: OpenModel) -> ChatTemplate:
    if CHAT not in opened.companions:
        raise UserError(
            f"the model {opened.source} has no chat template, so it was not trained to answer; train it on "
            "conversations first (regpt finetune RECIPE --init-from MODEL --data FILE --out RUN)"
        )
    return ChatTemplate(opened.companions[CHAT], opened.tokenizer)


def open_judge(asked: BestOf, template: ChatTemplate, opened: OpenModel) -> tuple[tuple[str, ...], Judge, float, str]:
    """The prompts, what gives replies their rewards, the least that is kept, and the hash of the model of rewards."""
    if asked.reward.startswith(TASK):
        if asked.prompts:
            raise UsageError(f"--reward {asked.reward} asks the task's own questions; leave out --prompts")
        items = make_items(chat_options(asked.reward.removeprefix(TASK)), "train")
        right = lambda number, replies: [float(check_reply(items[number], one)) for one in replies]  # noqa: E731
        return tuple(one.question for one in items), right, 1.0, ""
    if not asked.prompts:
        raise UsageError("no prompts were given; add --prompts FILE, or --reward chat:TASK, which has its own")
    judge = open_model(asked.reward, opened.model.device)
    if not judge.model.config.reward_head:
        raise UserError(
            f"--reward {asked.reward} is a model without a head for rewards; train one with regpt finetune reward-124m "
            "--init-from MODEL --data PAIRS --out RUN, or give chat:TASK"
        )
    if judge.tokenizer.sha256 != opened.tokenizer.sha256:
        raise UserError(
            f"--reward {asked.reward} has another tokenizer ({judge.tokenizer.name}) than {opened.source} "
            f"({opened.tokenizer.name}); train it from that model"
        )
    if template_of(judge).sha256 != template.sha256:
        raise UserError(
            f"--reward {asked.reward} was trained with another chat template than {opened.source}; train it with the "
            "same one (--template)"
        )
    return asked.prompts, rewards_by(judge, template, asked), -math.inf, judge.weights_sha256


def rewards_by(judge: OpenModel, template: ChatTemplate, asked: BestOf) -> Judge:
    """Rewards of whole conversations by the model's head, at the last token that was trained of each."""
    model = judge.model

    @torch.no_grad()
    def rewards(number: int, replies: Sequence[str]) -> list[float]:
        if not replies:
            return []
        said = {"role": "user", "content": asked.prompts[number]}
        each = [template.encode_training([said, {"role": "assistant", "content": one}]) for one in replies]
        last = [int((one.parts != CONTEXT).nonzero()[0][-1]) for one in each]
        if max(last) >= (longest := model.config.max_seq_len):
            raise UserError(
                f"prompt {number + 1} and a reply to it have {max(last) + 1:,} tokens, --reward {asked.reward} reads "
                f"{longest:,}; set a smaller --max-new-tokens"
            )
        idx = torch.zeros(len(each), max(last) + 1, dtype=torch.int64)  # what follows an end is read by nothing
        for row, one, end in zip(idx, each, last):
            row[: end + 1] = torch.from_numpy(one.ids[: end + 1].astype("int64"))
        with torch.autocast(model.device.type, enabled=False):
            hidden = model.hidden(idx.to(model.device))  # (K, T, C)
            found = model.rewards(hidden[torch.arange(len(each)), torch.tensor(last)]).tolist()
        for reply, one in enumerate(found):
            if not math.isfinite(one):
                raise UserError(
                    f"the reward of reply {reply + 1} to prompt {number + 1} is {one}: the weights of "
                    f"{asked.reward} are damaged; give an earlier checkpoint of it"
                )
        return found

    return rewards


def resumed(file: Path, made: dict[str, Any]) -> tuple[int, int]:
    """The first prompt that is not done, and the lines of the file, whose torn end is cut off.

    Raises:
        UserError: it was written with other settings.
    """
    if not file.exists():
        return 0, 0
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = [parse_row(line) for line in whole.splitlines()]
    for number, row in enumerate(rows, 1):
        there = row.get("made") if row else None
        if not isinstance(there, dict) or there != made:
            differing = sorted(k for k in made if not isinstance(there, dict) or there.get(k) != made[k])
            raise UserError(
                f"line {number} of {file} was written with other settings ({', '.join(differing[:4])}); choose another "
                "--write, or delete it"
            )
    if len(whole) < len(content):
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
    return (int(rows[-1]["number"]) + 1 if rows and rows[-1] else 0), len(rows)


def judged(
    opened: OpenModel, template: ChatTemplate, asked: BestOf, prompts: Sequence[str], first: int, judge: Judge
) -> Iterator[BestReply]:
    """The prompts from `first` on, in their order; several are answered at once."""
    longest, stops = opened.model.config.max_seq_len, template.stop_ids
    room = max(1, MOST_ROWS // asked.k)  # prompts at once
    engine = Engine(
        opened.model, max_rows=room * asked.k, cache_tokens=room * asked.k * -(-longest // PAGE_SIZE) * PAGE_SIZE
    )
    numbers: dict[int, int] = {}
    texts: dict[int, list[list[int]]] = {}
    left: dict[int, int] = {}
    done: dict[int, BestReply] = {}
    following, at = first, first
    while at < len(prompts):
        while following < len(prompts) and len(left) < 2 * room:
            ids = template.encode([{"role": "user", "content": prompts[following]}])
            seed = int(splitmix64(asked.seed, following, 1)[0])
            request = Request(ids, asked.max_new_tokens, asked.options, seed, n=asked.k, stop_ids=stops)
            numbers[engine.submit(request)] = following
            texts[following], left[following] = [[] for _ in range(asked.k)], asked.k
            following += 1
        for event in engine.step():
            if event.finish_reason == "error":
                raise bad_logits()
            number = numbers[event.request]
            if event.token is not None:
                texts[number][event.choice].append(event.token)
            left[number] -= event.finish_reason is not None
            if not left[number]:
                del left[number], numbers[event.request]
                done[number] = choose(number, texts.pop(number), template, judge)
        while at in done:
            yield done.pop(at)
            at += 1


def choose(number: int, texts: list[list[int]], template: ChatTemplate, judge: Judge) -> BestReply:
    """The first reply of the largest reward, of those that ended by themselves."""
    ended = [k for k, ids in enumerate(texts) if ids and ids[-1] in template.stop_ids]
    said = [template.tokenizer.decode(texts[k][:-1]) for k in ended]
    usable = [(k, text) for k, text in zip(ended, said) if text.strip()]
    scores: list[float | None] = [None] * len(texts)
    for (k, _), score in zip(usable, judge(number, [text for _, text in usable])):
        scores[k] = score
    best = max(usable, key=lambda one: (scores[one[0]], -one[0]), default=None)
    return BestReply(number, scores, *((None, "") if best is None else best))
