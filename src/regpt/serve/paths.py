"""Fields of a path → requests of the engine."""

import asyncio
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from regpt.checkpoint.open import OpenModel
from regpt.engine.generate import encode_prompt
from regpt.engine.processing import SamplingOptions
from regpt.engine.receipt import Origin
from regpt.engine.request import Request, Structure
from regpt.engine.structured import Structures
from regpt.errors import UserError
from regpt.serve.answers import Answer, ChatShape, CompletionShape
from regpt.serve.chat import read_messages
from regpt.serve.fields import (
    CHAT,
    CHAT_NEUTRAL,
    COMPLETIONS,
    COMPLETIONS_NEUTRAL,
    RESPONSES,
    RESPONSES_NEUTRAL,
    ApiError,
    read_bias,
    read_fields,
    read_stop,
    shown,
    wants_usage,
)
from regpt.serve.responses import ResponseShape
from regpt.serve.worker import Limits, TextJob, Worker
from regpt.text.chat import ChatTemplate
from regpt.text.retrieved import Passage, last_question, retrieved_prompt
from regpt.text.tokenizer import Tokenizer

SHORT = 8192  # characters that are encoded in the event loop; longer texts in a thread


@dataclass(frozen=True)
class ServedModel:
    """A model with its worker.

    Attributes:
        chat: None where there is no chat template.
        longest_token: bytes.
        retrieve: passages for a question of a chat; None retrieves nothing.
    """

    id: str
    worker: Worker
    opened: OpenModel
    precision: str
    longest: int
    chat: ChatTemplate | None
    created: int
    longest_token: int
    retrieve: Callable[[str], list[Passage]] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.opened.tokenizer

    @cached_property
    def origin(self) -> Origin:
        """Reads the files of the weights at the first receipt, where no manifest has their hashes."""
        template = sha256(self.chat.source.encode()).hexdigest() if self.chat else None
        engine = self.worker.engine
        hashes = self.opened.weights_sha256, self.tokenizer.sha256, template
        return Origin(self.id, *hashes, self.precision, engine.device.type, "fp8" if engine.pages.narrow else "")

    @cached_property
    def structures(self) -> Structures:
        """Reads the vocabulary at the first request for structured output."""
        ends = self.chat.stop_ids if self.chat else self.tokenizer.stop_ids
        return Structures(self.tokenizer, self.worker.engine.n_vocab, ends)

    def description(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "regpt",
            "max_model_len": self.longest,
            "chat_template": self.chat is not None,
            "tokenizer_sha256": self.tokenizer.sha256,
        }


def exceeding(prompt: int, new: int, longest: int, param: str, about: str = "") -> ApiError:
    message = (
        f"this model reads {longest} tokens, {about}{prompt + new} were asked for: {prompt} of the prompt, {new} new; "
        "shorten the prompt or ask for fewer new tokens"
    )
    return ApiError(message, param=param, code="context_length_exceeded")


def check_fits(model: ServedModel, prompts: Sequence[Sequence[int]], new: int, param: str) -> None:
    for prompt in prompts:
        if len(prompt) + new > model.longest:
            raise exceeding(len(prompt), new, model.longest, param)


def check_characters(model: ServedModel, text: str, param: str) -> None:
    """Refuse a text that cannot fit, whatever its tokens are, before it is encoded."""
    least = -(-len(text) // model.longest_token)
    if least > model.longest:
        raise exceeding(least, 0, model.longest, param, "at least ")


async def read_origin(model: ServedModel, wanted: bool) -> Origin | None:
    """For a receipt, where one is wanted."""
    try:
        return await asyncio.to_thread(lambda: model.origin) if wanted else None
    except UserError as error:
        raise ApiError(str(error), param="receipt", code="invalid_value") from None


async def read_structure(
    model: ServedModel, form: Mapping[str, Any] | None
) -> tuple[Callable[[], Structure] | None, dict[str, str]]:
    """What `response_format` asks for, none for text: any object, or what a JSON schema describes; and the schema."""
    if form is None or form == {"type": "text"}:
        return None, {}
    described = form.get("json_schema")
    schema: Any = described.get("schema") if isinstance(described, dict) else None
    if form == {"type": "json_object"}:
        schema = {"type": "object"}
    elif form.get("type") != "json_schema" or len(form) > 2 or not isinstance(schema, dict):
        types = '"text", "json_object", or "json_schema" with {"schema": {…}} as its "json_schema"'
        message = f"response_format is {shown(form)}, its type must be {types}"
        raise ApiError(message, param="response_format", code="invalid_value")
    text = json.dumps(schema)
    try:
        return await asyncio.to_thread(lambda: model.structures.of_schema(text)), {"json_schema": text}
    except UserError as error:
        raise ApiError(str(error), param="response_format", code="invalid_value") from None


async def in_thread_if_long(length: int, function: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(function) if length > SHORT else function()


async def read_prompts(model: ServedModel, given: Any, limits: Limits) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts of `prompt`: a text, tokens, or a list of one of these."""
    if given is None or given == []:
        raise ApiError("prompt is missing or empty", param="prompt", code="missing_required_parameter")
    alone = isinstance(given, str) or type(given[0]) is int
    prompts = [given] if alone else given
    if len(prompts) > limits.texts:
        message = f"prompt has {len(prompts)} prompts, at most {limits.texts} are allowed"
        raise ApiError(message, param="prompt", code="invalid_value")
    ids, texts = [], []
    for one in prompts:
        if isinstance(one, str):
            check_characters(model, one, "prompt")
            ids.append(await in_thread_if_long(len(one), lambda one=one: encode_prompt(model.tokenizer, one)))
            texts.append(one)
            continue
        n_vocab = model.worker.engine.n_vocab
        wrong = (
            [one]
            if type(one) is not list or not one
            else [i for i in one if type(i) is not int or not 0 <= i < n_vocab]
        )
        if wrong:
            message = f"prompt has {shown(wrong[0])}, must be texts, or arrays of token ids from 0 to {n_vocab - 1}"
            raise ApiError(message, param="prompt", code="invalid_value")
        ids.append(one)
        if len(one) <= model.longest:
            texts.append(model.tokenizer.decode(one))
    return ids, texts


def make_requests(
    model: ServedModel,
    fields: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    new: int,
    top: int,
    limits: Limits,
    stop_ids: Sequence[int],
    structure: Callable[[], Structure] | None = None,
) -> list[Request]:
    """One request a prompt, all with the same seed: a text depends on its prompt, options and seed alone."""
    n, seed = fields["n"], fields["seed"]
    if n * len(prompts) > limits.texts:
        message = f"n is {n} and there are {len(prompts)} prompts, at most {limits.texts} texts a request are allowed"
        raise ApiError(message, param="n", code="invalid_value")
    seed = secrets.randbits(31) if seed is None else seed
    numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    bias = read_bias(fields["logit_bias"], model.worker.engine.n_vocab)
    stop, user = read_stop(fields["stop"]), fields["user"] or ""
    try:
        options = SamplingOptions(*(fields[name] for name in numbers), logit_bias=bias)
        return [
            Request(
                prompt,
                new,
                options,
                seed,
                n,
                stop_ids=stop_ids,
                stop=stop,
                top_logprobs=top,
                user=user,
                structure=structure,
            )
            for prompt in prompts
        ]
    except UserError as error:
        raise ApiError(str(error), code="invalid_value") from None


async def completion(model: ServedModel, body: Mapping[str, Any], limits: Limits) -> tuple[Answer, bool]:
    """The answer to come of `/v1/completions`, and whether it is a stream."""
    fields = read_fields(body, COMPLETIONS, COMPLETIONS_NEUTRAL)
    usage = wants_usage(fields["stream_options"], fields["stream"])
    prompts, texts = await read_prompts(model, fields["prompt"], limits)
    new, top, echo = fields["max_tokens"], fields["logprobs"], fields["echo"]
    if new == 0 and not echo:
        message = "max_tokens is 0, must be at least 1 unless echo is true"
        raise ApiError(message, param="max_tokens", code="invalid_value")
    if new == 0 and fields["receipt"]:
        message = "receipt is true and max_tokens is 0: nothing is written that a receipt could be of"
        raise ApiError(message, param="receipt", code="invalid_value")
    check_fits(model, prompts, new, "prompt")
    origin = await read_origin(model, fields["receipt"])
    origin = origin and replace(origin, template_sha256=None)  # the prompt is the client's
    requests = make_requests(model, fields, prompts, new, top or 0, limits, model.tokenizer.stop_ids)
    job = TextJob(requests, top if echo else None, generate=new > 0)
    answer = Answer(job, model.tokenizer, CompletionShape(), model.id, top, texts if echo else (), usage, origin)
    return answer, fields["stream"]


async def chat(model: ServedModel, body: Mapping[str, Any], limits: Limits) -> tuple[Answer, bool]:
    """The answer to come of `/v1/chat/completions`, and whether it is a stream."""
    fields = read_fields(body, CHAT, CHAT_NEUTRAL)
    usage = wants_usage(fields["stream_options"], fields["stream"])
    if fields["messages"] is None:
        raise ApiError("messages is missing", param="messages", code="missing_required_parameter")
    if fields["top_logprobs"] and not fields["logprobs"]:
        message = f"top_logprobs is {fields['top_logprobs']} and logprobs is not true; set it"
        raise ApiError(message, param="top_logprobs", code="invalid_value")
    prompt, sources = await conversation(model, read_messages(fields["messages"]), "messages")
    new = new_tokens(model, prompt, fields, ("max_completion_tokens", "max_tokens"), "messages")
    top = fields["top_logprobs"] or 0
    stop_ids = model.chat.stop_ids if model.chat else ()
    structure, schema = await read_structure(model, fields["response_format"])
    origin = await read_origin(model, fields["receipt"])
    job = TextJob(make_requests(model, fields, [prompt], new, top, limits, stop_ids, structure))
    alternatives = top if fields["logprobs"] else None
    answer = Answer(job, model.tokenizer, ChatShape(), model.id, alternatives, (), usage, origin, schema, sources)
    return answer, fields["stream"]


async def response(model: ServedModel, body: Mapping[str, Any], limits: Limits) -> tuple[Answer, bool]:
    """The answer to come of `/v1/responses`, and whether it is a stream. Nothing is stored."""
    fields = read_fields(body, RESPONSES, RESPONSES_NEUTRAL)
    given = fields["input"]
    if given is None:
        raise ApiError("input is missing", param="input", code="missing_required_parameter")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if fields["instructions"] is not None:
        messages = [{"role": "system", "content": fields["instructions"]}, *messages]
    prompt, sources = await conversation(model, read_messages(messages, "input"), "input")
    new = new_tokens(model, prompt, fields, ("max_output_tokens",), "input")
    stop_ids = model.chat.stop_ids if model.chat else ()
    job = TextJob(make_requests(model, fields | {"n": 1, "stop": None}, [prompt], new, 0, limits, stop_ids))
    origin = await read_origin(model, fields["receipt"])
    answer = Answer(job, model.tokenizer, ResponseShape(fields), model.id, origin=origin, sources=sources)
    return answer, fields["stream"]


async def conversation(
    model: ServedModel, messages: list[dict[str, str]], param: str
) -> tuple[list[int], list[Passage] | None]:
    """Tokens of messages by the model's template, and the passages among them where the server retrieves."""
    template = model.chat
    if template is None:
        raise ApiError(
            f"the model {model.id!r} has no chat template: it continues text, and was not taught to answer; use "
            "/v1/completions, or start the server with --chat-template FILE (or plain, or bare)",
            param="messages",
            code="no_chat_template",
        )
    length = sum(len(message["content"]) for message in messages)
    check_characters(model, "".join(message["content"] for message in messages), param)
    retrieve, sources = model.retrieve, None
    try:
        if retrieve is None:
            prompt = await in_thread_if_long(length, lambda: template.encode(messages))
        else:
            found = await asyncio.to_thread(retrieve, last_question(messages))
            prompt, sources = await asyncio.to_thread(retrieved_prompt, template.encode, messages, found, model.longest)
    except UserError as error:
        raise ApiError(str(error), param=param, code="template_error") from None
    return prompt or [model.tokenizer.eot], sources


def new_tokens(
    model: ServedModel, prompt: Sequence[int], fields: Mapping[str, Any], names: Sequence[str], param: str
) -> int:
    """How many tokens may be written: what is asked for, else what fits."""
    given = [(name, fields[name]) for name in names if fields[name] is not None]
    if len({value for _, value in given}) > 1:
        said = " and ".join(f"{name} is {value}" for name, value in given)
        raise ApiError(f"{said}; give one of them", param=given[0][0], code="invalid_value")
    room = model.longest - len(prompt)
    new = given[0][1] if given else max(room, 1)
    check_fits(model, [prompt], new, param)
    return new
