"""`regpt chat`: talk with a model, line by line."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import is_terminal, print_line, print_note, write_stream
from regpt.errors import UsageError, UserError
from regpt.ranges import MANY, Range
from regpt.train.config import WritingPrecision

if TYPE_CHECKING:
    from regpt.checkpoint.open import OpenModel
    from regpt.engine.processing import SamplingOptions
    from regpt.engine.request import Stats
    from regpt.engine.speculate import Draft
    from regpt.model.transformer import Transformer

HELP = '''/reset           forget the conversation
/system TEXT     begin again with this system message; without TEXT show it
/params          show how answers are drawn; /params temperature 0.7 changes one
/retry           another answer to the last message
/save FILE       write the conversation as JSON; /load FILE reads one
/exit            leave; so does the end of the input
"""              begins a message of several lines, and ends it'''
BLOCK = '"""'
STEPPED = re.compile(r"(.+)@(\d+|best)")  # a run's checkpoint


@dataclass(frozen=True)
class DrawFlags:
    """Flags of every command that writes text: which weights, where, and how tokens are drawn."""

    top_k: Annotated[int, Range(0, MANY)] = 50
    """Draw from the k likeliest tokens; 0 from all, 1 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability, after top-k; 1 from all."""
    min_p: float = 0.0
    """Draw from tokens of at least this share of the likeliest one's probability; 0 from all."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 safer, above 1 more surprising text; 0 takes the likeliest token."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of prompt and text become less likely (Keskar et al. 2019); 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the new text has; 0: off."""
    frequency_penalty: float = 0.0
    """The same, once for every time; 0: off."""
    seed: int = 1337
    """The same seed and the same text before give the same text."""
    step: Annotated[str, tyro.conf.arg(metavar="N|best")] = ""
    """Of a run: the checkpoint of this step, or best, that of the lowest validation loss; default: the newest."""
    ema: bool = False
    """With the moving average of the weights, which train.ema_decay keeps."""
    draft: Annotated[str, tyro.conf.arg(metavar="MODEL|ngram")] = ""
    """Draw several tokens a step, the same ones: what proposes them, a smaller model of the same tokenizer, an earlier
    checkpoint of the run (RUN@STEP), or ngram, earlier places of the text."""
    draft_tokens: Annotated[int, Range(1, 64)] = 4
    """Tokens proposed a step at most."""
    kv_cache: Literal["", "fp8"] = ""
    """fp8: keep keys and values in 8 bits; default: in the format of the computation."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: WritingPrecision = "fp32"
    """Number format of the computation; int8: weights in 8.5 bits, products in fp32 on a CPU and in bf16 on
    CUDA; bf16-invariant: on CUDA, bf16 in which no text depends on the others of its batch."""

    def options(self) -> "SamplingOptions":
        """How tokens are drawn; refused here, before a model is read."""
        from regpt.engine.processing import SamplingOptions

        names = {field.name for field in fields(SamplingOptions)} & {field.name for field in fields(self)}
        return SamplingOptions(**{name: getattr(self, name) for name in names})

    @contextlib.contextmanager
    def opened(self, model: str) -> "Iterator[OpenModel]":
        """The model that `model` means, in `precision` on `device`, within the context in which it writes."""
        from regpt.checkpoint.best import at_step
        from regpt.checkpoint.open import open_model
        from regpt.parallel.mesh import choose_device
        from regpt.train.precision import check_precision, set_matmul_precision, writing

        check_draft_flags(self.draft, self.draft_tokens)
        device = choose_device(self.device)
        check_precision(self.precision, device)
        opened = open_model(at_step(model, self.step), device, ema=self.ema)
        set_matmul_precision(self.precision)
        with writing(opened.model, self.precision, device):
            yield opened

    def drafting(self, opened: "OpenModel") -> dict[str, Any]:
        """Options of the engine of `opened`; raises what `open_draft` does."""
        draft = open_draft(self.draft, opened, self.precision)
        return {"draft": draft, "draft_tokens": self.draft_tokens, "narrow_cache": self.kv_cache == "fp8"}


def check_draft_flags(draft: str, draft_tokens: int) -> None:
    if not draft and draft_tokens != 4:
        raise UsageError("--draft-tokens changes nothing without a draft; add --draft MODEL|ngram, or leave it out")


def open_draft(name: str, opened: "OpenModel", precision: WritingPrecision) -> "Transformer | Draft | None":
    """What `--draft` names, to propose tokens to `opened`; None where it is empty.

    Raises:
        UsageError: it is no model, or one of another tokenizer.
    """
    from regpt.checkpoint.best import at_step
    from regpt.checkpoint.open import open_model
    from regpt.engine.speculate import NGrams
    from regpt.train.precision import writing

    if name in ("", "ngram"):
        return NGrams() if name else None
    named = None if Path(name).exists() else STEPPED.fullmatch(name)
    try:
        draft = open_model(at_step(named[1], named[2]) if named else name, opened.model.device)
    except UserError as error:
        raise type(error)(f"--draft: {error}; or give --draft ngram, which needs no model") from None
    if draft.tokenizer.sha256 != opened.tokenizer.sha256:
        raise UsageError(
            f"the draft {name!r} has the tokenizer {draft.tokenizer.name}, the model "
            f"{opened.tokenizer.name}; give a draft of the same tokenizer, or ngram"
        )
    writing(draft.model, precision, draft.model.device)  # its weights; the context is the model's
    return draft.model


def acceptance(stats: "Stats") -> str:
    """How many of a draft's tokens were drawn."""
    if not stats.proposed:
        return "the draft proposed no token: it never does for structured texts, and ngram not where nothing repeats"
    share = f"{stats.accepted / stats.proposed:.0%}"
    return f"{stats.accepted:,} of {stats.proposed:,} tokens that the draft proposed were drawn ({share})"


Drawing = Annotated[DrawFlags, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class ChatArgs:
    """Talk with a model; /help lists the commands. A model without a chat template continues the text instead."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """As in regpt sample."""
    system: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """System message that the conversation begins with."""
    max_new_tokens: Annotated[int, Range(1, MANY)] = 512
    """Tokens an answer at most, fewer where the model's length is reached."""
    retrieve: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Before each message put the passages of these documents (whatever regpt data prepare reads) that BM25 finds."""
    passages: Annotated[int, Range(1, 100)] = 3
    """How many at most, and together half of what the model reads."""
    other_template: bool = False
    """Talk with a model whose chat template is not the one that its certificate names."""
    draw: Drawing = field(default_factory=DrawFlags)


def main(args: list[str]) -> int:
    """Open the model, then answer lines of standard input until its end."""
    given = parse(ChatArgs, args, prog="regpt chat")
    given.draw.options()  # refused before a model is read
    with given.draw.opened(given.model) as opened:
        chat = Chat(opened, given)
        print_note(f"{opened.source}; /help lists the commands")
        for text in messages_of(sys.stdin):
            try:
                if not chat.take(text):
                    break
            except UserError as error:
                print_note(error)
    return 0


class Chat:
    """A conversation with a model.

    Args:
        opened: the model, with its chat template where it has one.
        given: how answers are drawn, and the system message.
    """

    def __init__(self, opened: "OpenModel", given: ChatArgs):
        from regpt.engine.engine import Engine
        from regpt.prepare.passages import PassageIndex
        from regpt.text.certificate import refuse_other_template
        from regpt.text.chat import ChatTemplate
        from regpt.text.folder import CHAT

        self.tokenizer, self.given = opened.tokenizer, given
        template = opened.companions.get(CHAT)
        refuse_other_template(template or "", opened.companions, given.other_template)
        self.template = None if template is None else ChatTemplate(template, self.tokenizer)
        self.longest = opened.model.config.max_seq_len
        self.index = PassageIndex(given.retrieve) if given.retrieve else None
        drafting = given.draw.drafting(opened)
        self.engine = Engine(opened.model, self.tokenizer, max_rows=1, cache_tokens=self.longest, **drafting)
        self.messages: list[dict[str, str]] = []
        self.reset(given.system)
        if self.index:
            print_note(self.index.sentence())
        if self.template is None:
            print_note(
                "this model has no chat template: it was not trained to answer, and continues what is written instead"
            )

    def reset(self, system: str) -> None:
        if system and self.template is None:
            raise UsageError("a system message needs a chat template, and this model has none; write it as text")
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, text: str) -> bool:
        """Answer a message, or follow a command; False at the end."""
        command, _, rest = text.partition(" ") if text.startswith("/") else ("", "", "")
        commands: dict[str, Callable[[str], object]] = {
            "/reset": lambda rest: self.reset(self.system),
            "/system": self.change_system,
            "/params": self.change_params,
            "/retry": self.retry,
            "/save": self.save,
            "/load": self.load,
            "/help": lambda rest: print_line(HELP),
        }
        if command in ("/exit", "/quit"):
            return False
        if command in commands:
            commands[command](rest.strip())
        elif command and "/" not in command[1:]:  # not a path, say
            raise UsageError(f"{command} is no command; /help lists them")
        elif text:
            self.answer({"role": "user", "content": text})
        return True

    def answer(self, *message: dict[str, str]) -> None:
        """Write an answer to the conversation with `message`; neither stays where it cannot be written."""
        from regpt.engine.request import Request, bad_logits
        from regpt.text.retrieved import cited

        before = list(self.messages)
        self.messages += message
        try:
            prompt, stop_ids = self.prompt()
            most = max(1, min(self.given.max_new_tokens, self.longest - len(prompt)))
            draw = self.given.draw
            number = self.engine.submit(Request(prompt, most, draw.options(), draw.seed, stop_ids=stop_ids))
        except UserError as error:
            self.messages = before
            raise UserError(f"{error}; /reset forgets the conversation") from None
        pieces, reason = [], None
        try:
            while self.engine.busy:
                for event in self.engine.step():
                    reason = event.finish_reason or reason
                    if not (event.finish_reason == "stop" and event.token in stop_ids):
                        pieces.append(event.text)
                        write_stream(sys.stdout, event.text)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            self.engine.cancel(number)
            list(self.engine.step())
        print_line()
        if reason == "error":
            self.messages = before
            raise bad_logits()
        if reason == "length":
            print_note(f"the answer was cut after {most:,} tokens")
        if self.engine.draft is not None:
            print_note(acceptance(self.engine.stats()))
        if self.index is not None:
            print_note(cited(self.sources) or f"no passage of {self.index.name} was found, or has room")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def prompt(self) -> tuple[list[int], tuple[int, ...]]:
        """Tokens of the conversation with its passages, and those that end an answer."""
        from regpt.text.retrieved import last_question, retrieved_prompt

        found = self.index.search(last_question(self.messages), self.given.passages)[0] if self.index else []
        ids, self.sources = retrieved_prompt(self.encode, self.messages, found, self.longest)
        return ids, (self.template or self.tokenizer).stop_ids

    def encode(self, messages: Sequence[Any]) -> list[int]:
        if self.template is not None:
            return self.template.encode(messages)
        text = "".join(message["content"] for message in messages)
        return self.tokenizer.encode_prompts([text])[0].tolist() or [self.tokenizer.eot]

    @property
    def system(self) -> str:
        return next((one["content"] for one in self.messages if one["role"] == "system"), "")

    def change_system(self, text: str) -> None:
        if text:
            self.reset(text)
        else:
            print_line(self.system or "no system message")

    def change_params(self, text: str) -> None:
        """Show the parameters, or set one: `name value`."""
        name, _, value = text.partition(" ")
        name, values = name.replace("-", "_"), self.params()
        if not name:
            print_line("\n".join(f"{name.replace('_', '-')} {value}" for name, value in values.items()))
            return
        if name not in values or not value:
            allowed = ", ".join(values).replace("_", "-")
            raise UsageError(f"/params {text} is not understood; give a name and a value, of {allowed}")
        try:
            changed = self.changed(name, type(values[name])(value))
        except ValueError:
            raise UsageError(f"{name.replace('_', '-')} is {value!r}, must be a number") from None
        if changed.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens is {changed.max_new_tokens}, must be at least 1")
        changed.draw.options()
        self.given = changed

    def changed(self, name: str, value: Any) -> ChatArgs:
        if name == "max_new_tokens":
            return replace(self.given, max_new_tokens=value)
        return replace(self.given, draw=replace(self.given.draw, **{name: value}))

    def params(self) -> dict[str, Any]:
        shown = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        drawn = {name: getattr(self.given.draw, name) for name in shown}
        return drawn | {"max_new_tokens": self.given.max_new_tokens}

    def retry(self, _: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer to write again")
        self.messages.pop()
        self.given = self.changed("seed", self.given.draw.seed + 1)
        self.answer()

    def save(self, name: str) -> None:
        from regpt.files import write_json

        if not name:
            raise UsageError("/save needs a file name")
        write_json(Path(name), {"messages": self.messages}, "choose another file")
        print_note(f"{len(self.messages)} messages in {name}")

    def load(self, name: str) -> None:
        from regpt.structured import read_object

        if not name or not Path(name).is_file():
            raise UsageError(f"there is no file {name!r}; /load needs one that /save wrote")
        messages = read_object(Path(name), "give a file that /save wrote").get("messages")
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise UserError(f"{name} holds no messages of a role and a content; give a file that /save wrote")
        self.messages = [{"role": one["role"], "content": one["content"]} for one in messages]
        for one in self.messages:
            print_line(f"{one['role']}: {one['content']}")


def is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def messages_of(stream: Any) -> Iterator[str]:
    """Messages of standard input: lines, or what stands between two lines of three quotation marks."""
    block: list[str] | None = None
    for line in typed_lines(stream):
        if line.strip() == BLOCK:
            if block is not None:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        else:
            yield line.strip()
    if block:
        yield "\n".join(block)


def typed_lines(stream: Any) -> Iterator[str]:
    """Lines as typed, after a mark; or of a file, in UTF-8.

    Raises:
        UserError: it is not UTF-8.
    """
    if stream is None or stream.closed:
        raise UsageError("standard input is closed; regpt chat reads messages from it")
    if is_terminal(stream):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history, where the platform has it)
        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):
                print_line()
                return
    for number, line in enumerate(stream.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of standard input is not UTF-8 ({error.reason}); convert it") from None
