"""`/v1/explain`: how one token of a text was drawn."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from regpt.engine.engine import Engine
from regpt.engine.explain import Explanation, explain_draw
from regpt.engine.request import Request
from regpt.serve.chat import read_messages
from regpt.serve.fields import CHAT, COMPLETIONS, SAMPLING, TEXT, ApiError, Field, read_fields, shown, whole
from regpt.serve.paths import ServedModel, check_fits, conversation, make_requests, read_prompts
from regpt.serve.worker import NOT_FINITE, Limits
from regpt.text.tokenizer import with_bytes

EXPLAIN = {
    "model": TEXT,
    "prompt": COMPLETIONS["prompt"],
    "messages": CHAT["messages"],
    "tokens": Field((list,), inner={list: {"items": {"type": "integer", "minimum": 0}}}),
    "top": whole(1, 50, 12),
    **SAMPLING,
}


async def explanation(model: ServedModel, body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The answer of `/v1/explain`: the token that follows `prompt` (or `messages`) and the new `tokens`."""
    fields = read_fields(body, EXPLAIN, {})
    if fields["seed"] is None:
        raise ApiError("seed is missing: it decides the noise", param="seed", code="missing_required_parameter")
    prompt, stop_ids = await read_start(model, fields)
    new, n_vocab = fields["tokens"] or [], model.worker.engine.n_vocab
    if wrong := [one for one in new if type(one) is not int or not 0 <= one < n_vocab]:
        message = f"tokens has {shown(wrong[0])}, must be token ids from 0 to {n_vocab - 1}"
        raise ApiError(message, param="tokens", code="invalid_value")
    check_fits(model, [prompt], len(new) + 1, "tokens")
    neutral = {"n": 1, "stop": None, "user": None}
    (request,) = make_requests(model, fields | neutral, [prompt], 1, 0, limits, stop_ids)
    found = await model.worker.ask(
        lambda engine: next_draw(engine, replace(request, prompt=[*prompt, *new]), len(prompt), fields["top"])
    )
    if found is None:
        raise ApiError(NOT_FINITE, status=500)
    bytes_of = model.tokenizer.token_bytes
    return {
        "object": "explanation",
        "model": model.id,
        "position": len(prompt) + len(new),
        "seed": request.seed,
        "temperature": request.options.temperature,
        "prompt_token_ids": prompt,
        "stop_token_ids": list(stop_ids),
        "drawn": found.token,
        "kept": found.kept,
        "tokens": [
            {"text": with_bytes(bytes_of(one.token)), "bytes": list(bytes_of(one.token))} | one._asdict()
            for one in found.paths
        ],
    }


async def read_start(model: ServedModel, fields: Mapping[str, Any]) -> tuple[list[int], tuple[int, ...]]:
    """Tokens of the prompt or of the conversation, and the tokens that end what follows it."""
    if (fields["prompt"] is None) == (fields["messages"] is None):
        raise ApiError("give either prompt or messages", param="prompt", code="invalid_value")
    if fields["messages"] is not None:
        prompt, _ = await conversation(model, read_messages(fields["messages"]), "messages")
        return prompt, model.chat.stop_ids if model.chat else ()
    prompts, _ = await read_prompts(model, fields["prompt"], Limits(texts=1))
    return prompts[0], tuple(model.tokenizer.stop_ids)


def next_draw(engine: Engine, request: Request, n_prompt: int, most: int) -> Explanation | None:
    """The draw after the request's tokens, of which `n_prompt` are the prompt, from an uncached forward."""
    tokens = list(request.prompt)
    ids = torch.tensor([tokens], device=engine.device)
    with torch.no_grad(), engine.computing():
        logits = engine.model.logits(engine.model.hidden(ids)[:, -1])[0]
    text = tokens[:n_prompt], tokens[n_prompt:]
    return explain_draw(logits, request.options, request.seed, len(tokens), text, most)
