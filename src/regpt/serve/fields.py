"""JSON body → checked fields. What is not implemented is refused by name, a wrong value with its range."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regpt.errors import nearest
from regpt.ranges import MANY, SEED, Range

NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "an array", dict: "an object"}  # fmt: skip  # noqa: E501
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Field:
    """Kinds of JSON that a field takes, the range of its numbers, its value where it is missing or null, and for the
    description what lists and objects hold."""

    kinds: tuple[type, ...]
    default: Any = None
    allowed: Range | None = None
    inner: Mapping[type, Any] = field(default_factory=dict)

    def checked(self, name: str, value: Any) -> Any:
        fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in self.kinds)
        if not fits:
            wanted = " or ".join(NAMES[kind] for kind in self.kinds)
            raise ApiError(f"{name} is {shown(value)}, must be {wanted}", param=name, code="invalid_type")
        if self.allowed is not None and type(value) in (int, float) and (problem := self.allowed.problem(value)):
            raise ApiError(f"{name} is {shown(value)}, {problem}", param=name, code="invalid_value")
        return value

    def schema(self) -> dict[str, Any]:
        """For the OpenAPI description."""
        kinds = [{"type": TYPES[kind]} | self.inner.get(kind, {}) for kind in self.kinds]
        if self.allowed is not None:
            low = "exclusiveMinimum" if self.allowed.above else "minimum"
            kinds = [one | {low: self.allowed.low, "maximum": self.allowed.high} for one in kinds]
        return {"anyOf": [*kinds, {"type": "null"}]} | ({} if self.default is None else {"default": self.default})


def real(low: float, high: float, default: float | None, above: bool = False) -> Field:
    return Field((float,), default, Range(low, high, above=above))


def whole(low: int, high: int, default: int | None = None) -> Field:
    return Field((int,), default, Range(low, high))


TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPTS = {"items": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}, TOKEN_IDS]}, "minItems": 1}
BIAS = {"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
ROLES = ("system", "developer", "user", "assistant")
PART_KINDS = ("text", "input_text", "output_text")


def closed(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """An object of these properties and no other, for the description."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


PART = closed({"type": {"enum": PART_KINDS}, "text": {"type": "string"}}, "type", "text")
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}
MESSAGE = closed({"role": {"enum": ROLES}, "content": CONTENT, "name": {"type": "string"}}, "role", "content")
MESSAGES = {"items": MESSAGE, "minItems": 1}
SCHEMA = closed({"name": {}, "description": {}, "strict": {}, "schema": {"type": "object"}}, "schema")
FORMAT = closed({"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": SCHEMA}, "type")
USAGE = closed({"include_usage": {"type": ["boolean", "null"]}})
STOPS = {"items": {"type": "string", "minLength": 1}, "maxItems": 16}
TEXT, SWITCH = Field((str,)), Field((bool,), False)
SAMPLING = {
    "temperature": real(0, 100, 1.0),
    "top_p": real(0, 1, 1.0, above=True),
    "top_k": whole(0, MANY, 0),
    "min_p": real(0, 1, 0.0),
    "repetition_penalty": real(0.001, 1000, 1.0),
    "presence_penalty": real(-2, 2, 0.0),
    "frequency_penalty": real(-2, 2, 0.0),
    "logit_bias": Field((dict,), inner={dict: BIAS}),
    "seed": whole(0, SEED),
}
COMMON = {
    "model": TEXT,
    **SAMPLING,
    "n": whole(1, MANY, 1),
    "stop": Field((str, list), inner={str: {"minLength": 1}, list: STOPS}),
    "stream": SWITCH,
    "stream_options": Field((dict,), inner={dict: USAGE}),
    "user": TEXT,
    "receipt": SWITCH,
}
COMPLETIONS = {
    **COMMON,
    "prompt": Field((str, list), inner={list: PROMPTS}),
    "max_tokens": whole(0, MANY, 16),
    "logprobs": whole(0, 20),
    "echo": SWITCH,
}
CHAT = {
    **COMMON,
    "messages": Field((list,), inner={list: MESSAGES}),
    "max_tokens": whole(1, MANY),
    "max_completion_tokens": whole(1, MANY),
    "logprobs": SWITCH,
    "top_logprobs": whole(0, 20),
    "response_format": Field((dict,), inner={dict: FORMAT}),
}
RESPONSES = {
    "model": TEXT,
    **SAMPLING,
    "input": Field((str, list), inner={list: MESSAGES}),
    "instructions": TEXT,
    "max_output_tokens": whole(1, MANY),
    "stream": SWITCH,
    "user": TEXT,
    "receipt": SWITCH,
}
# Fields that OpenAI has and this server does not implement, with the values that ask for nothing.
SHARED_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
COMPLETIONS_NEUTRAL = SHARED_NEUTRAL | {"best_of": (1,), "suffix": ("",)}
CHAT_NEUTRAL = SHARED_NEUTRAL | {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
RESPONSES_NEUTRAL = SHARED_NEUTRAL | {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


ERROR = {"message": {"type": "string"}, "type": {"type": "string"}, "param": {}, "code": {}}
SAID = closed({"error": closed(ERROR, *ERROR)}, "error")


def described(
    fields: Mapping[str, Field], required: Sequence[str], neutral: Mapping[str, tuple[Any, ...]] | None = None
) -> dict[str, Any]:
    """OpenAPI's description of a path: its body, and what answers are."""
    properties = {name: field.schema() for name, field in fields.items()}
    properties |= {name: {"enum": [None, *values]} for name, values in (neutral or {}).items()}
    for name in required:  # null is as if it were missing
        properties[name]["anyOf"].pop()
    whole_answer = {"application/json": {"schema": {"type": "object"}}}
    if "stream" in fields:
        whole_answer["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {"description": "refused", "content": {"application/json": {"schema": SAID}}}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": closed(properties, *required)}},
        },
        "responses": {"200": {"description": "the answer", "content": whole_answer}, "4XX": refused, "5XX": refused},
    }


def shown(value: Any) -> str:
    """`value` as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json_object(data: bytes) -> dict[str, Any]:
    """The object that a body holds."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except RecursionError:
        raise ApiError("the body is nested too deeply to be read", code="invalid_json") from None
    except UnicodeEncodeError:
        raise ApiError(
            "the body has a lone surrogate (\\ud800 to \\udfff), which is no text", code="invalid_json"
        ) from None
    except ValueError as error:  # also of UTF-8, and of numbers of thousands of digits
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if type(body) is not dict:
        raise ApiError(f"the body is {shown(body)}, must be a JSON object", code="invalid_json")
    return body


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_fields(
    body: Mapping[str, Any], fields: Mapping[str, Field], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """Every field of `fields`, checked; null is as if it were missing.

    Raises:
        ApiError: an unknown field, one that is not implemented, or a value that is not allowed.
    """
    for name, value in body.items():
        if name in fields:
            continue
        param = where + name
        if name not in neutral:
            hint = nearest(name, fields)
            raise ApiError(f"the field {shown(param)} is unknown{hint}", param=param, code="unknown_parameter")
        if value is not None and not any(json.dumps(value) == json.dumps(one) for one in neutral[name]):
            allowed = ", ".join(map(shown, neutral[name])) or "null"
            raise ApiError(
                f"{param} is {shown(value)}, which this server does not implement; leave it out (allowed: {allowed})",
                param=param,
                code="unsupported_parameter",
            )
    given = {name: body[name] for name in fields if body.get(name) is not None}
    checked = {name: fields[name].checked(where + name, value) for name, value in given.items()}
    return {name: checked.get(name, field.default) for name, field in fields.items()}


def read_stop(value: str | list[Any] | None, most: int = 16) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value or []
    if len(stop) > most:
        raise ApiError(f"stop has {len(stop)} strings, at most {most} are allowed", param="stop", code="invalid_value")
    for one in stop:
        if type(one) is not str or not one:
            raise ApiError(
                f"stop has {shown(one)}, must be strings that are not empty", param="stop", code="invalid_value"
            )
    return tuple(stop)


def read_bias(value: Mapping[str, Any] | None, n_vocab: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (value or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < n_vocab):
            message = f"logit_bias has the key {shown(key)}, must be a token id from 0 to {n_vocab - 1}"
            raise ApiError(message, param="logit_bias", code="invalid_value")
        if type(bias) not in (int, float) or not abs(bias) <= 100 or not math.isfinite(bias):
            message = f"logit_bias of token {key} is {shown(bias)}, must be a number from -100 to 100"
            raise ApiError(message, param="logit_bias", code="invalid_value")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def wants_usage(options: Mapping[str, Any] | None, stream: bool) -> bool:
    """`stream_options`: only `include_usage`, and only true is true."""
    if options is None:
        return False
    if not stream:
        raise ApiError(
            "stream_options is allowed only where stream is true", param="stream_options", code="invalid_value"
        )
    return bool(read_fields(options, {"include_usage": SWITCH}, {}, "stream_options.")["include_usage"])
