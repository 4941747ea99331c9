"""Messages → TOKENS, by a model's chat template (Jinja, as Hugging Face's `chat_template`)."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from regpt.errors import UserError
from regpt.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role and content
APART = "\ue000"  # within a user's text, cuts what spells a special token; of no script, and taken out again
ANSWER = "\ue001"  # in place of an answer, to see what follows one


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
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not valid: {error} (line {line_of(error)})") from None
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
        encoded as ordinary characters."""
        apart = [{key: self.keep_apart(value) for key, value in message.items()} for message in messages]
        text = self.render(apart, answer_next=answer_next)
        ids: list[int] = []
        at = 0
        for found in [*self.names.finditer(text), None]:
            part = text[at : None if found is None else found.start()].replace(APART, "")
            encode = self.tokenizer.encode_continuations if ids else self.tokenizer.encode_batch
            ids += encode([part])[0].tolist() if part else []
            if found is not None:
                ids.append(self.special[found.group()])
                at = found.end()
        return ids

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
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
            _, _, after = self.render(messages, answer_next=False).partition(ANSWER)
        except UserError:
            return None
        found = self.names.match(after.lstrip())
        return None if found is None else self.special[found.group()]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ends = () if self.end_of_turn is None else (self.end_of_turn,)
        return tuple(dict.fromkeys((*ends, *self.tokenizer.stop_ids)))


def refuse(message: object) -> None:
    """A template's own refusal, such as of roles in another order."""
    raise TemplateError(str(message))


def line_of(error: TemplateError) -> object:
    return getattr(error, "lineno", "?")
