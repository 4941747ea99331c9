"""TOKENS → TEXT, one token at a time: never a part of a character, never a part of a stop string."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from regpt.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 8  # of the prompt, the last ones: enough to know whether it ends within a character


class TextStream:
    """Text of the tokens that follow a prompt, in pieces that together are the text.

    A piece waits while it ends in an incomplete character, or in what may become a stop string.

    Args:
        prompt: its tokens; only the last ones matter.
        stop: strings that end the text; none is empty. The first to be complete and what follows it are left out.

    Attributes:
        stopped: whether one was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = [token for token in prompt if token != tokenizer.eot]
        self.first: list[int] | None = [] if not before else None  # the first tokens, until they have given text
        for token in before[-CONTEXT_TOKENS:]:
            self.decoder.decode(tokenizer.token_bytes(token))
        self.held = ""

    def push(self, token: int) -> str:
        """The piece that `token` completes, perhaps empty."""
        text = self.decoder.decode(self.tokenizer.token_bytes(token))
        if self.first is not None:
            self.first.append(token)
            if text:  # Llama 2's tokenizer puts a space before every text, which is none of it
                text = text[1:] if text[0] == " " and self.tokenizer.decode(self.first)[:1] != " " else text
                self.first = None
        return self.release(text, last=False)

    def finish(self) -> str:
        """What still waits: nothing follows."""
        return self.release(self.decoder.decode(b"", final=True), last=True)

    def release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += text
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:  # the first to be complete, whether or not a token holds more
            self.stopped, end = True, min(found)[1]
        else:
            end = len(self.held) - (0 if last else self.waiting())
        piece, self.held = self.held[:end], "" if self.stopped else self.held[end:]
        return piece

    def waiting(self) -> int:
        """Characters at the end of `held` that may begin a stop string."""
        longest = max(map(len, self.stop), default=0) - 1
        ends = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.held[-n:]) for stop in self.stop)), 0)


def text_pieces(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `prompt_ids` and the `tokens` after them, up to one of `stop_ids`, in pieces of whole characters; the
    first is the prompt, which waits where it ends within a character."""
    prompt = list(prompt_ids)
    if prompt[:1] == [tokenizer.eot]:
        del prompt[0]
    stream = TextStream(tokenizer)
    if opening := "".join(map(stream.push, prompt)):
        yield opening
    for token in tokens:
        if token in tokenizer.stop_ids:
            break
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece
