"""Special tokens added to a tokenizer, after the ids that it has."""

import json
from collections.abc import Collection, Sequence

import numpy as np

from regpt.errors import UserError
from regpt.hf.export import tokenizer_json
from regpt.text.open import from_json
from regpt.text.rules import ENDS_TEXT
from regpt.text.tokenizer import Tokenizer

PLACE = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def add_special_tokens(tokenizer: Tokenizer, names: Sequence[str], ends: Collection[str] = ()) -> Tokenizer:
    """`tokenizer` with `names` as special tokens; those in `ends` end a text. Names that it has already stay.

    Raises:
        UserError: a name that is text to the tokenizer.
    """
    special = {tokenizer.token_bytes(int(i)).decode() for i in np.flatnonzero(tokenizer.byte_lengths() == 0)}
    content = json.loads(tokenizer_json(tokenizer))
    for name in (name for name in names if name in content["model"]["vocab"] and name not in special):
        raise UserError(f"{name!r} is a token of text in {tokenizer.name}; it cannot become a special token")
    new = [name for name in names if name not in special]
    ids = {name: tokenizer.n_vocab + k for k, name in enumerate(new)}
    content["added_tokens"] += [{"id": ids[name], "content": name, **PLACE} for name in new]
    for token in content["added_tokens"]:
        token.update({ENDS_TEXT: True} if token["content"] in ends else {})
    found = from_json(json.dumps(content))
    assert found.n_vocab == tokenizer.n_vocab + len(new)
    assert found.eot == tokenizer.eot
    return found
