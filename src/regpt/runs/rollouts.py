"""Batches that the model writes itself: questions of chat tasks, replies by the engine, rewards by the tasks' checkers.

Rollouts are a pure function of the weights, `train.seed` and the number of the question in the run: a resumed run
writes the same ones.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpt.checkpoint.open import open_model
from regpt.config import RunConfig
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import Loader
from regpt.data.order import row_key, shuffled, splitmix64
from regpt.data.packed import REFERENCE, RESTORE, ConversationRows
from regpt.engine.engine import PAGE_SIZE, Engine
from regpt.engine.fast import half_copy
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits
from regpt.errors import UsageError, UserError
from regpt.evals.chat.items import ChatItem
from regpt.evals.chat.tasks import chat_options, check_reply, make_items
from regpt.evals.specs import parse_tasks
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.runs.build import Corpus
from regpt.structured import read_object
from regpt.train.grpo import AGREEMENT, PolicyGradient, advantages, overlong_penalty
from regpt.train.precision import autocast, parameter_dtype
from regpt.train.trainer import Row

ROLLOUT = int.from_bytes(b"rollout", "big")  # XORed into the seed: other draws may use the same one
ROUNDS = 65  # seeds of a question: its own, and those of `grpo.resample`
MOST_ROWS = 1024  # replies that are written at once
STATE = "rollouts"  # in the state of a checkpoint between the updates of one rollout


def grpo_items(tasks: str) -> list[ChatItem]:
    """The questions of the tasks' train splits.

    Raises:
        UsageError: a task that is unknown, or that no program can check.
    """
    items: list[ChatItem] = []
    for spec in parse_tasks(tasks):
        if spec.kind != "chat":
            raise UsageError(
                f"grpo.tasks names {spec}, whose replies no program checks; give chat tasks, such as chat:addition"
            )
        items += make_items(chat_options(spec.argument), "train")
    return items


class DrawnReply(NamedTuple):
    """Tokens of a reply, the log-probabilities that they were drawn with, and its reward."""

    ids: list[int]
    logps: list[float]
    reward: float


class QuestionRows(ConversationRows):
    """Row i is reply i mod K to question ⌊i / K⌋ of a run; what is stored of it is the question with a right answer."""

    replies = 1

    def layout(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.arange(count)
        return self.questions((first + rows) // self.replies), rows, np.zeros(count, dtype=np.int64)

    def questions(self, groups: np.ndarray, attempt: int = 0) -> np.ndarray:
        """The items (groups,) int64 that are asked; every one once an epoch."""
        epochs, places = np.divmod(groups, len(self.lengths))
        found = np.empty_like(groups)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            found[own] = shuffled(places[own], len(self.lengths), row_key(self.seed, epoch, attempt))
        return found

    def epoch_rows(self, limit: int) -> int:
        return limit

    def epochs(self, row: int) -> list[float]:
        return [row / self.replies / len(self.lengths)]


class RolloutLoader(Loader):
    """The batches of a run of GRPO. The batch of a step is written when it is first asked for, with the weights of
    then; with `grpo.updates` > 1 those of the next steps, too.

    Attributes:
        facts: of the replies of the present step, over all processes.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, mesh: Mesh, model: Transformer, first_row: int = 0):
        """
        Raises:
            UsageError: a batch that groups of replies do not fill, or rows without room for a reply.
            UserError: data that were made for other tasks.
        """
        self.config, self.grpo, self.mesh, self.model = config, config.grpo, mesh, model
        data, train, K = config.data, config.train, config.grpo.replies
        folder = corpus.folders[0]
        rows = QuestionRows(folder.path, folder.manifest, "train", "packed", data.seed, data.seq_len)
        rows.replies = K
        super().__init__(
            rows,
            batch_tokens=train.batch_tokens,
            micro_batch_rows=train.first_rows,
            dp_rank=mesh.rank,
            dp_size=mesh.world_size,
            pin_memory=mesh.device.type == "cuda",
            first_row=first_row,
        )
        self.questions = rows
        if self.batch_rows % (K * mesh.world_size):
            raise UsageError(
                f"train.batch_tokens {train.batch_tokens} holds {self.batch_rows} rows, which {mesh.world_size} × "
                f"grpo.replies {K} does not divide; set train.batch_tokens to a multiple of "
                f"{K * mesh.world_size * data.seq_len}"
            )
        self.items = grpo_items(self.grpo.tasks)
        if len(self.items) != len(rows.lengths):
            raise UserError(f"{rows.source} has {len(rows.lengths):,} questions, grpo.tasks has {len(self.items):,}")
        template = corpus.chat()
        assert template is not None
        self.template = template
        self.prompts = [self.template.encode([{"role": "user", "content": one.question}]) for one in self.items]
        longest = max(map(len, self.prompts))
        if longest + self.grpo.max_new_tokens > data.seq_len:
            raise UsageError(
                f"a question has {longest} tokens and grpo.max_new_tokens is {self.grpo.max_new_tokens}, more than "
                f"data.seq_len {data.seq_len}; set it to {longest + self.grpo.max_new_tokens} or more"
            )
        self.facts: Row = {}
        self.number, self.written = -1, list[list[tuple[list[int], list[DrawnReply]]]]()
        self.part = 0
        self.made: tuple[int, Batch] | None = None
        self.writer: Engine | None = None
        self.reference: Transformer | None = None

    # ---- what the trainer asks for

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        """As `Loader.step`, of the replies to this rank's share of the questions."""
        number, self.part = divmod(step, self.grpo.updates)
        if number != self.number:
            started = time.perf_counter()
            self.written = self.write(number)
            self.number, self.made = number, None
            self.facts["rollout_ms"] = (time.perf_counter() - started) * 1e3
        if self.made is None or self.made[0] != step:
            self.made = step, self.batch_of(self.written[self.part])
        whole, B = self.made[1], micro_batch_rows or self.micro_batch_rows
        return [
            Batch(*(None if x is None else x[i : i + B] for x in whole))  # type: ignore[arg-type]
            for i in range(0, len(whole.idx), B)
        ]

    def completed(self, row: Row) -> Row:
        """A row of metrics with the facts of its replies.

        Raises:
            UserError: the training step does not compute the log-probabilities that the engine drew with.
        """
        error, bound = row["max_delta_logp"], AGREEMENT.get(self.model.dtype)
        exact = self.config.train.precision in ("fp32", "fp64") and self.part == 0
        if bound is not None and exact and not error <= bound:  # type: ignore[operator]
            raise UserError(
                f"step {row['step']}: log-probabilities of the training step differ by {error:.2e} from those that the "
                f"replies were drawn with, at most {bound:g} is rounding in {self.config.train.precision}; report it, "
                "with the versions that regpt doctor prints"
            )
        return row | self.facts

    def state(self) -> dict[str, str]:
        """Replies that later steps will use; nothing between two rollouts."""
        left = self.number >= 0 and self.part + 1 < self.grpo.updates
        return {STATE: json.dumps([self.number, self.written, self.facts])} if left else {}

    def load_state(self, state: Mapping[str, str] | None) -> None:
        if state and STATE in state:
            self.number, written, self.facts = json.loads(state[STATE])
            self.written = [[(prompt, [DrawnReply(*one) for one in each]) for prompt, each in step] for step in written]

    # ---- rollouts

    def write(self, number: int) -> list[list[tuple[list[int], list[DrawnReply]]]]:
        """The questions and replies of this rank for each update of the rollout `number`; of questions without a reply
        of use, none."""
        G, rank, size = self.batch_rows // self.grpo.replies, self.mesh.rank, self.mesh.world_size
        first = self.first_row // self.grpo.replies + number * self.grpo.updates * G
        groups = np.concatenate([first + k * G + np.arange(rank, G, size) for k in range(self.grpo.updates)])
        engine = self.engine()
        found = dict(enumerate(self.replies(engine, groups, 0)))
        alike = [k for k, (_, each) in found.items() if len({one.reward for one in each}) == 1]
        self.note(list(found.values()), len(alike))
        for attempt in range(1, self.grpo.resample + 1):
            if not alike:
                break
            found |= dict(zip(alike, self.replies(engine, groups[alike], attempt)))
            alike = [k for k in alike if len({one.reward for one in found[k][1]}) == 1]
        own = G // size
        parts = [list(range(k, k + own)) for k in range(0, len(groups), own)]
        dropped = set(alike) if self.grpo.resample else set()
        used = [[k for k in part if k not in dropped] or part for part in parts]  # all alike: an update of nothing
        return [[found[k] for k in part] for part in used]

    def replies(self, engine: Engine, groups: np.ndarray, attempt: int) -> list[tuple[list[int], list[DrawnReply]]]:
        """The prompt of each group's question, and the replies to it."""
        K, most, stops = self.grpo.replies, self.grpo.max_new_tokens, self.template.stop_ids
        options = SamplingOptions(temperature=self.grpo.temperature, top_k=0)
        asked = self.questions.questions(groups, attempt).tolist()
        seeds = [int(splitmix64(self.config.train.seed ^ ROLLOUT, g * ROUNDS + attempt, 1)[0]) for g in groups.tolist()]
        places = {
            engine.submit(Request(self.prompts[item], most, options, seed, n=K, stop_ids=stops)): k
            for k, (item, seed) in enumerate(zip(asked, seeds))
        }
        drawn = [[(list[int](), list[float]()) for _ in range(K)] for _ in asked]
        while engine.busy:
            for event in engine.step():
                if event.finish_reason == "error":
                    raise bad_logits()
                ids, logps = drawn[places[event.request]][event.choice]
                ids.append(event.token)  # type: ignore[arg-type]
                logps.append(event.logprob)  # type: ignore[arg-type]
        engine.pages.forget()  # of these weights
        return [
            (self.prompts[item], [DrawnReply(ids, logps, self.reward(self.items[item], ids)) for ids, logps in each])
            for item, each in zip(asked, drawn)
        ]

    def reward(self, item: ChatItem, ids: list[int]) -> float:
        """1 for a right reply that ended by itself, less what is overlong."""
        ended = ids[-1] in self.template.stop_ids
        right = ended and check_reply(item, self.template.tokenizer.decode(ids[:-1]))
        return float(right) + overlong_penalty(len(ids), self.grpo.max_new_tokens, self.grpo.overlong)

    def note(self, written: list[tuple[list[int], list[DrawnReply]]], alike: int) -> None:
        """Facts of the replies, over all processes.

        Raises:
            UserError: no reply of the run's first ones ended by itself.
        """
        each = [one for _, replies in written for one in replies]
        ended = sum(one.ids[-1] in self.template.stop_ids for one in each)
        own = [
            len(each),
            sum(one.reward for one in each),
            sum(len(one.ids) for one in each),
            ended,
            alike,
            len(written),
        ]
        sums = [json.loads(part) for part in self.mesh.gather(json.dumps(own).encode())]
        n, reward, tokens, ended, alike, groups = map(sum, zip(*sums))
        if self.number < 0 and not ended:
            raise UserError(
                f"none of {n:,} replies ended within {self.grpo.max_new_tokens} tokens, so none can be right; tune the "
                "model on conversations first (regpt finetune sft-124m …), or raise --grpo.max-new-tokens"
            )
        self.facts = {"reward": reward / n, "reply_tokens": tokens / n, "ended": ended / n}
        self.facts |= {"groups_alike": alike / groups}

    def engine(self) -> Engine:
        """The engine, made once, with the present weights: the model itself, or where that is computed by autocast on a
        GPU a copy in half precision, which CUDA graphs and kernels read where it is."""
        train = self.config.train
        halved = self.mesh.device.type == "cuda" and train.autocast_precision in ("bf16", "fp16")
        if self.writer is None:
            rows = min(MOST_ROWS, self.batch_rows // self.mesh.world_size * self.grpo.updates)
            room = rows * -(-self.config.data.seq_len // PAGE_SIZE) * PAGE_SIZE
            half = torch.bfloat16 if train.autocast_precision == "bf16" else torch.float16
            model = half_copy(self.model, half) if halved else self.model
            with autocast("fp32" if halved else train.autocast_precision, self.mesh.device):
                self.writer = Engine(model, max_rows=rows, cache_tokens=room)
            self.writer.decode_step.processed = True
        if halved:
            with torch.no_grad():
                torch._foreach_copy_(list(self.writer.model.parameters()), list(self.model.parameters()))  # pyright: ignore
        return self.writer

    # ---- replies → batch

    def batch_of(self, groups: list[tuple[list[int], list[DrawnReply]]]) -> Batch:
        """Rows of questions with their replies, those of a whole step; rows that are left over have no target."""
        n, T, K = self.batch_rows // self.mesh.world_size, self.seq_len, self.grpo.replies
        idx, targets = np.full((n, T), self.questions.eot), np.full((n, T), IGNORE_INDEX)
        drawn, better = np.zeros((n, self.grpo.max_new_tokens)), np.zeros(n)
        rewards = np.array([[one.reward for one in replies] for _, replies in groups])
        better[: rewards.size] = advantages(rewards, self.grpo.loss).reshape(-1)
        for g, (prompt, replies) in enumerate(groups):
            for row, one in enumerate(replies, g * K):
                P, L = len(prompt), len(one.ids)
                idx[row, : P + L] = [*prompt, *one.ids]
                targets[row, P - 1 : P - 1 + L] = one.ids
                drawn[row, :L] = one.logps
        pin = self.pin_memory
        whole = [torch.from_numpy(x) for x in (idx, targets)]
        whole += [
            torch.from_numpy(x.astype(np.float64 if self.model.dtype == torch.float64 else np.float32))
            for x in (better, drawn)
        ]
        idx_, targets_, better_, drawn_ = (x.pin_memory() if pin else x for x in whole)
        batch = Batch(idx_, targets_, advantages=better_, drawn=drawn_)
        return batch._replace(reference=self.under_reference(batch)) if self.grpo.beta else batch

    @torch.no_grad()
    def under_reference(self, batch: Batch) -> Tensor:
        """Log-probabilities (n, R) of the replies under the model that the run began with."""
        train, device = self.config.train, self.mesh.device
        if self.reference is None:
            self.reference = open_reference(self.config, device)
        objective = PolicyGradient(self.reference, self.grpo, self.grpo.max_new_tokens)
        found = []
        for i in range(0, len(batch.idx), B := self.micro_batch_rows):
            with autocast(train.autocast_precision, device):
                part = Batch(batch.idx[i : i + B], batch.targets[i : i + B]).to(device)
                found.append(objective.logps(part)[0].cpu())
        return torch.cat(found)


def open_reference(config: RunConfig, device: torch.device) -> Transformer:
    """The model that REFERENCE, next to the shards, names.

    Raises:
        UserError: its weights are others now.
    """
    said: Any = read_object(Path(config.data.path) / REFERENCE, RESTORE)
    opened = open_model(said["model"], device)
    if opened.weights_sha256 != said["weights_sha256"]:
        raise UserError(
            f"the weights of {said['model']!r} are not those that the run began with, which grpo.beta compares with; "
            "restore them, or begin the run again"
        )
    return opened.model.to(parameter_dtype(config.train.precision, config.train.weight_dtype)).eval()
