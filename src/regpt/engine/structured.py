"""Structured output: texts that match a JSON schema or a regular expression, by llguidance (extra `structured`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpt.engine.request import Structure
from regpt.errors import UserError, import_extra
from regpt.text.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer as llguidance asks for one: the bytes of every token, and an encoder."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = np.flatnonzero(tokenizer.byte_lengths() == 0).tolist()
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[-1], tokenizer.eot

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode_continuations([text])[0].tolist()


class Structures:
    """Makes the structures of a model's requests; the tokenizer is read once.

    Args:
        n_vocab: of the model, the tokenizer's or more.
        ends: the tokens that may end a text where it is whole; default: the tokenizer's `stop_ids`.

    Raises:
        UserError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, ends: Sequence[int] = ()):
        llguidance = import_extra("llguidance", "structured output needs llguidance", "structured")
        self.library, self.n_vocab, self.ends = llguidance, n_vocab, ends or tokenizer.stop_ids
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokenizer)))

    def of_schema(self, schema: Mapping[str, Any] | str) -> Callable[[], Structure]:
        """JSON that a JSON schema describes.

        Raises:
            UserError: it is no schema, or has what llguidance does not implement; nothing is left out.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"the JSON schema is not JSON ({error}); correct it") from None
        if not isinstance(found, dict | bool):
            raise UserError('the JSON schema is no object; give one, such as {"type": "object"}')
        return self.of(self.library.LLMatcher.grammar_from_json_schema(text), "JSON schema")

    def of_regex(self, pattern: str) -> Callable[[], Structure]:
        """Text that a regular expression matches from beginning to end."""
        return self.of(self.library.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def of(self, grammar: str, name: str) -> Callable[[], Structure]:
        failed, said = self.library.LLMatcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        if failed or said:  # a warning, too, is of something that would not be obeyed
            raise UserError(f"the {name} cannot be obeyed: {' '.join(said[0].split())}; change it")
        return lambda: Matched(self.library.LLMatcher(self.tokenizer, grammar), self.n_vocab, self.ends)


class Matched:
    """The tokens that may follow in one text, by a matcher of llguidance: a `Structure`."""

    def __init__(self, matcher: Any, n_vocab: int, ends: Sequence[int]):
        self.matcher, self.n_vocab, self.ends = matcher, n_vocab, ends

    def allowed(self) -> Tensor:
        allowed = torch.zeros(self.n_vocab, dtype=torch.bool)
        if self.matcher.is_error():
            return allowed
        if self.matcher.is_stopped():  # whole: nothing can follow but an end
            allowed[list(self.ends)] = True
            return allowed
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        found = np.unpackbits(bits, bitorder="little")[: self.n_vocab]
        allowed[: len(found)] = torch.from_numpy(found.astype(bool))
        if self.matcher.is_accepting():  # any of the tokens that end a text may
            allowed[list(self.ends)] = True
        return allowed

    def accept(self, token: int) -> None:
        if token not in self.ends and not self.matcher.consume_token(token):
            raise RuntimeError(f"token {token} does not fit the structure: {self.matcher.get_error()}")
