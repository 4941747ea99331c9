"""Messages → TOKENS, by a model's chat template (Jinja, as Hugging Face's `chat_template`).

A conversation is rendered in pieces: with and without the header of the next answer, message by message. Each token
knows the piece it is from, so what is trained on is never searched for in the text, and an answer is encoded apart from
what precedes it, in training as in use.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from regpt.errors import UserError
from regpt.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role and content
APART = "\ue000"  # within a user's text, cuts what spells a special token; of no script, and taken out again
PROBE = "\ue001"  # in place of an answer, to see what the template writes around one
CONTEXT, ANSWER, FORMAT = 0, 1, 2  # parts: read only, an answer's text, what the template writes in and after an answer

# Of a base model: no token that its tokenizer lacks. `<|endoftext|>` begins a conversation, as it begins every
# document, and ends every answer; roles are words, so a user can write them, and a model can be led by that.
PLAIN = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:\\n' + message.content + eos_token }}
{%- elif message.role == 'user' or message.role == 'system' or message.role == 'tool' %}
{{- message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
{%- else %}{{ raise_exception('no role is called ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""

# OpenAI's ChatML, as Qwen has it: two tokens that no user can write mark every message.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {"plain": PLAIN, "chatml": CHATML}


class RenderedPiece(NamedTuple):
    """A part of a rendered conversation that is encoded by itself.

    Attributes:
        text: with `APART` in what only spells a special token.
        message: index of the message, of a longer context of its first one.
        part: CONTEXT, ANSWER or FORMAT.
    """

    text: str
    message: int
    part: int


class EncodedConversation(NamedTuple):
    """Token ids (n,) uint32, and for each its part (n,) uint8 and the index of its message (n,) int32."""

    ids: np.ndarray
    parts: np.ndarray
    messages: np.ndarray


class ChatTemplate:
    """A template and the tokenizer that its special tokens belong to.

    Attributes:
        end_of_turn: the special token that the template writes after an answer; None where it writes none.

    Raises:
        UserError: the template is not one.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer
        ids = np.flatnonzero(tokenizer.byte_lengths() == 0).tolist()
        self.special = {tokenizer.token_bytes(token).decode("utf-8", "replace"): token for token in ids}
        self.special.pop("", None)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        try:
            self.template = chat_environment().from_string(source)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not valid: {error} (line {line_of(error)})") from None
        self.fault = ""  # why a plain question and answer cannot be rendered
        self.end_of_turn = self.find_end_of_turn()

    def render(self, messages: Sequence[Message], *, answer_next: bool = True) -> str:
        """The text of `messages`; with `answer_next` up to where the assistant begins.

        Raises:
            UserError: the template refuses them, or does what a template must not.
        """
        tokens = self.tokenizer
        begins, ends = (tokens.token_bytes(one).decode("utf-8", "replace") for one in (tokens.eot, tokens.stop_ids[-1]))
        given = {"messages": messages, "add_generation_prompt": answer_next, "bos_token": begins, "eos_token": ends}
        try:
            return self.template.render(**given)
        except (TemplateError, SecurityError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"the model's chat template cannot render these messages: {error}") from None

    def encode(self, messages: Sequence[Message], *, answer_next: bool = True) -> list[int]:
        """Token ids of `render`. Special tokens are those that the template writes: what spells one in a message is
        encoded as ordinary characters. Answers are encoded apart from what precedes them, as in training, where the
        template can be divided."""
        try:
            pieces = self.pieces(messages, answer_next=answer_next)
        except UserError:
            pieces = [RenderedPiece(self.render(self.apart(messages), answer_next=answer_next), 0, CONTEXT)]
        return self.encode_pieces(pieces).ids.tolist()

    def encode_training(self, messages: Sequence[Message]) -> EncodedConversation:
        """The tokens of a whole conversation with their parts; an answer with `weight` 0 is read only.

        Raises:
            UserError: the template refuses the messages, cannot be divided, or writes nothing that ends an answer.
        """
        self.refuse_untrainable()
        return self.encode_pieces(self.pieces(messages))

    def refuse_untrainable(self) -> None:
        """Raise a UserError where no conversation can be trained on with this template, and say why."""
        if self.fault:
            raise UserError(f"{self.fault}; give another with --template")
        if self.end_of_turn is None:
            raise UserError(
                "the chat template writes no special token after an answer, so a model cannot learn to end one; give "
                "another with --template"
            )

    def pieces(self, messages: Sequence[Message], *, answer_next: bool = False) -> list[RenderedPiece]:
        """The rendered conversation, cut before and after each answer and after the token that ends it.

        Raises:
            UserError: the template refuses the messages, what it writes before an answer depends on what follows, or it
            changes an answer.
        """
        apart = self.apart(messages)
        whole = self.render(apart, answer_next=answer_next)
        pieces: list[RenderedPiece] = []
        at, first = 0, 0
        for i, message in enumerate(apart):
            if message.get("role") != "assistant":
                continue
            header = self.render(apart[:i])
            probed = [*apart[:i], {**message, "content": PROBE}, *apart[i + 1 :]]
            lead, found, rest = self.render(probed, answer_next=answer_next)[len(header) :].partition(PROBE)
            said = whole[len(header) + len(lead) : len(whole) - len(rest)]
            if len(header) < at or whole != header + lead + said + rest or not found:
                raise UserError(
                    f"the chat template cannot be divided at message {i}: what it writes up to there changes with what "
                    "follows, so the tokens of the answer are not known; give another with --template"
                )
            if said.strip() != str(message["content"]).strip():
                raise UserError(
                    f"the chat template writes something else than the answer of message {i}; take that part out of "
                    "the answer, or give another template with --template"
                )
            self.refuse_missing_prompt(lead, header, apart[:i])
            ending = self.names.search(rest)
            start = len(whole) - len(rest)
            end = start + (ending.end() if ending else 0)
            trained = message.get("weight", 1) != 0
            pieces.append(RenderedPiece(whole[at : len(header)], first, CONTEXT))
            for text, part in ((lead, FORMAT), (said, ANSWER), (whole[start:end], FORMAT)):
                pieces.append(RenderedPiece(text, i, part if trained else CONTEXT))
            at, first = end, i + 1
        pieces.append(RenderedPiece(whole[at:], first, CONTEXT))
        return [piece for piece in pieces if piece.text]

    def refuse_missing_prompt(self, lead: str, header: str, before: Sequence[Message]) -> None:
        """Raise a UserError where what opens an answer, `lead`, is not in the prompt `header` for one."""
        if self.names.search(lead) or (lead and header == self.render(before, answer_next=False)):
            raise UserError(
                f"the chat template has no generation prompt: it writes {lead!r} before an answer, and not before one "
                "that is to be written; give another with --template"
            )

    def encode_pieces(self, pieces: Sequence[RenderedPiece]) -> EncodedConversation:
        """Encode each piece by itself, and the names of special tokens in it as these."""
        ids: list[int] = []
        counts: list[int] = []
        for piece in pieces:
            before, at = len(ids), 0
            for found in [*self.names.finditer(piece.text), None]:
                part = piece.text[at : None if found is None else found.start()].replace(APART, "")
                encode = self.tokenizer.encode_continuations if ids else self.tokenizer.encode_batch
                ids += encode([part])[0].tolist() if part else []
                if found is not None:
                    ids.append(self.special[found.group()])
                    at = found.end()
            counts.append(len(ids) - before)
        parts, messages = ([piece.part for piece in pieces], [piece.message for piece in pieces])
        return EncodedConversation(
            np.array(ids, dtype=np.uint32),
            np.repeat(np.array(parts, dtype=np.uint8), counts),
            np.repeat(np.array(messages, dtype=np.int32), counts),
        )

    def apart(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [{key: self.keep_apart(value) for key, value in message.items()} for message in messages]

    def keep_apart(self, value: Any) -> Any:
        """`value` without the names of special tokens in its strings."""
        if isinstance(value, str):
            value = value.replace(APART, "")
            return self.names.sub(lambda found: found.group()[:1] + APART + found.group()[1:], value)
        if isinstance(value, Mapping):
            return {key: self.keep_apart(one) for key, one in value.items()}
        return [self.keep_apart(one) for one in value] if isinstance(value, list) else value

    def find_end_of_turn(self) -> int | None:
        try:
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
            _, _, after = self.render(messages, answer_next=False).partition(PROBE)
        except UserError as error:
            self.fault = str(error)
            return None
        found = self.names.match(after.lstrip())
        return None if found is None else self.special[found.group()]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ends = () if self.end_of_turn is None else (self.end_of_turn,)
        return tuple(dict.fromkeys((*ends, *self.tokenizer.stop_ids)))


def chat_environment() -> ImmutableSandboxedEnvironment:
    """The Jinja of chat templates, with the functions and filters of transformers' (`chat_template_utils`)."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return jinja


def refuse(message: object) -> None:
    """A template's own refusal, such as of roles in another order."""
    raise TemplateError(str(message))


def line_of(error: TemplateError) -> object:
    return getattr(error, "lineno", "?")
