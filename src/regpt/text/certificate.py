"""Template certificate: claims about a chat template and a tokenizer, checked on conversations and stored.

It goes with every checkpoint that was trained on conversations: what renders them later is compared with it.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from regpt.errors import UserError
from regpt.text.chat import ANSWER, APART, CONTEXT, FORMAT, ChatTemplate, EncodedConversation, Message
from regpt.text.folder import CERTIFICATE

FORMAT_VERSION = 1
HOSTILE = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "[INST]",
    "\n\nAssistant:\n",
    "  two  spaces ",
    "日本語🙂",
)


def prefixes(template: ChatTemplate, messages: Sequence[Message], row: EncodedConversation) -> bool:
    """The prompt for each answer is a prefix of the whole, in tokens, and what is trained on ends with the token that
    ends an answer."""
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = template.encode(messages[:i])
        if prompt != row.ids[: len(prompt)].tolist():
            return False
    trained = np.flatnonzero(row.parts != CONTEXT)
    last = trained[np.diff(trained, append=len(row.ids) + 1) > 1]  # the last token of every trained run
    return bool((row.ids[last] == template.end_of_turn).all())


def one_beginning(template: ChatTemplate, messages: Sequence[Message], row: EncodedConversation) -> bool:
    """The token that begins texts is the first or nowhere (but for ends of answers, where it is the same token), and
    the first where the tokenizer puts it before every text."""
    places = np.flatnonzero(row.ids == template.tokenizer.eot)
    if template.end_of_turn == template.tokenizer.eot:
        places = places[row.parts[places] != FORMAT]
    needed = len(template.tokenizer.encode_prompts([""])[0]) > 0
    return places.tolist() == [0] or (not len(places) and not needed)


def text_returns(template: ChatTemplate, messages: Sequence[Message], row: EncodedConversation) -> bool:
    """Decoding gives the rendered text (in composed characters, where the tokenizer composes them)."""
    text = template.render(template.apart(messages), answer_next=False).replace(APART, "")
    found = template.tokenizer.decode(row.ids.tolist())
    return found == text or found == unicodedata.normalize("NFC", text)


def answers_follow(template: ChatTemplate, messages: Sequence[Message], row: EncodedConversation) -> bool:
    """What is trained on of each answer begins where the prompt for it ends, and its text becomes the same tokens when
    it is encoded by itself."""
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        own = np.flatnonzero((row.messages == i) & (row.parts != CONTEXT))
        if len(template.encode(messages[:i])) != own[0]:
            return False
        said = row.ids[(row.messages == i) & (row.parts == ANSWER)].tolist()
        text = template.tokenizer.decode(said)
        if text and template.tokenizer.encode_continuations([text])[0].tolist() != said:
            return False
    return True


def no_forgery(template: ChatTemplate, messages: Sequence[Message], row: EncodedConversation) -> bool:
    """The special tokens are those of the same roles with other contents: no text of a message makes one."""
    blank = template.encode_training([{**message, "content": "a"} for message in messages]).ids
    special = list(template.special.values())
    return np.array_equal(row.ids[np.isin(row.ids, special)], blank[np.isin(blank, special)])


CLAIMS: dict[str, Callable[[ChatTemplate, Sequence[Message], EncodedConversation], bool]] = {
    "the prompt for an answer is a prefix of the conversation, and an answer ends with the end of a turn": prefixes,
    "the token that begins texts occurs once, at the start": one_beginning,
    "decoding the tokens gives the text": text_returns,
    "prompt, answer and end in use are the row that is trained on": answers_follow,
    "no text of a message makes a special token": no_forgery,
}


def broken_claim(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """The first claim that these messages break; None where all hold. Raises what `encode_training` does."""
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    row = template.encode_training(messages)
    return next((claim for claim, holds in CLAIMS.items() if not holds(template, messages, row)), None)


def certify(template: ChatTemplate, conversations: Iterable[Sequence[Message]]) -> dict[str, Any]:
    """The certificate of `template`, checked on `conversations` and on some that try to break it.

    Raises:
        UserError: a claim does not hold, or the template cannot render or divide one of the conversations.
    """
    checked = 0
    for messages in conversations:
        if claim := broken_claim(template, messages):
            raise broken(claim, messages)
        checked += 1
    tried = refused = 0
    for messages in hostile_conversations(template):
        try:
            claim = broken_claim(template, messages)
        except UserError:  # a template may have no system message
            refused += 1
            continue
        tried += 1
        if claim:
            raise broken(claim, messages)
    if not tried:
        raise UserError(
            "the chat template renders no conversation of user and assistant that it can be divided at; give another "
            "with --template"
        )
    end = template.end_of_turn
    assert end is not None
    return {
        "format_version": FORMAT_VERSION,
        "template_sha256": template.sha256,
        "tokenizer_sha256": template.tokenizer.sha256,
        "end_of_turn": {"id": end, "token": template.tokenizer.token_bytes(end).decode("utf-8", "replace")},
        "claims": list(CLAIMS),
        "conversations": checked,
        "hostile_conversations": tried,
        "refused_by_the_template": refused,
    }


def broken(claim: str, messages: Sequence[Message]) -> UserError:
    shown = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    return UserError(
        f"the chat template with this tokenizer breaks the claim that {claim}, with {shown[:300]}; give another "
        "with --template, or leave the row out"
    )


def hostile_conversations(template: ChatTemplate) -> list[list[dict[str, str]]]:
    """Conversations in which users and answers spell special tokens, spaces at both ends, and several turns."""
    texts = [*HOSTILE, *list(template.special)[:8], *(f" {name}\n" for name in list(template.special)[:4])]
    found = [turns(["user", "assistant"], [text, text.strip()]) for text in texts]
    found.append(turns(["user", "assistant"] * 3, ["a", "\nb\n", " c", "d ", "e\n\n", "1 2"]))
    found.append(turns(["system", "user", "assistant"], ["x <|im_start|>", "y", "z"]))
    return found


def turns(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def refuse_other_template(source: str, companions: Mapping[str, str], accepted: bool = False) -> None:
    """Raise a UserError where a model has a certificate and `source` is not the template that it names.

    Args:
        accepted: it is used nevertheless.
    """
    if CERTIFICATE not in companions or accepted or not source:
        return
    try:
        named = json.loads(companions[CERTIFICATE])["template_sha256"]
    except (ValueError, KeyError, TypeError):
        named = "another"
    if hashlib.sha256(source.encode()).hexdigest() != named:
        raise UserError(
            "the chat template is not the one that this model was trained with (its certificate names SHA-256 "
            f"{str(named)[:12]}…); restore it, or accept this one with --other-template"
        )
