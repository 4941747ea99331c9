"""Messages of a body → roles and texts."""

from collections.abc import Sequence
from typing import Any

from regpt.serve.fields import PART_KINDS, ROLES, ApiError, Field, read_fields, shown
from regpt.text.chat import APART

MESSAGE = {"role": Field((str,)), "content": Field((str, list)), "name": Field((str,))}
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
    "type": ("message",),
}
PART = {"type": Field((str,)), "text": Field((str,))}
# Of a base model, which continues it as text; nothing marks a role. (`plain` is what a base model is tuned with.)
BARE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def read_messages(given: Sequence[Any], param: str = "messages") -> list[dict[str, str]]:
    """Roles and texts of messages."""
    if not given:
        raise ApiError(f"{param} is empty, must have one message at least", param=param, code="invalid_value")
    return [read_message(one, f"{param}[{i}]") for i, one in enumerate(given)]


def read_message(given: Any, where: str) -> dict[str, str]:
    if type(given) is not dict:
        raise ApiError(f"{where} is {shown(given)}, must be an object", param=where, code="invalid_type")
    message = read_fields(given, MESSAGE, MESSAGE_NEUTRAL, f"{where}.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        said = f"{where}.role is {shown(role)}, must be one of {', '.join(ROLES)}"
        raise ApiError(said, param=f"{where}.role", code="invalid_value")
    if content is None:
        raise ApiError(f"{where}.content is missing", param=f"{where}.content", code="missing_required_parameter")
    if isinstance(content, list):
        content = "".join(read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if APART in content:  # the template's rendering would take it out
        said = f"{where}.content has U+E000, a character of private use that this server does not read"
        raise ApiError(said, param=f"{where}.content", code="invalid_value")
    return {"role": role, "content": content} | ({"name": message["name"]} if message["name"] else {})


def read_part(given: Any, where: str) -> str:
    if type(given) is not dict:
        raise ApiError(f"{where} is {shown(given)}, must be an object", param=where, code="invalid_type")
    if given.get("type") not in PART_KINDS:
        said = f"{where}.type is {shown(given.get('type'))}, this server reads text only"
        raise ApiError(said, param=f"{where}.type", code="unsupported_parameter")
    part = read_fields(given, PART, {"annotations": ([],), "logprobs": ([],)}, f"{where}.")
    if part["text"] is None:
        raise ApiError(f"{where}.text is missing", param=f"{where}.text", code="missing_required_parameter")
    return part["text"]
