"""A chat template as transformers renders it: what llama.cpp's rendering, by a Jinja of its own, is compared with."""

import json
from typing import Any

Conversation = list[dict[str, str]]


def turns(*contents: str, system: str = "") -> Conversation:
    """A conversation whose turns alternate between user and assistant."""
    told = [{"role": "system", "content": system}] if system else []
    return told + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS: list[Conversation] = [
    turns("Hello"),
    turns("  spaces around, two lines\nand an end  \n"),
    turns("Wie geht's? 你好 🙂 <b>&amp;</b> {{ braces }} {% raw %}"),
    turns("What is 2 + 2?", "4", "And 3 + 3?"),
    turns("one", "two", "three", "four", " five "),
    turns("Hello", system="You are helpful."),
    turns("a", "b\n\nc", "d", system="  Answer in one word.\n"),
]


def rendered(template: str, conversation: Conversation, bos: str, eos: str) -> str | None:
    """The prompt for the assistant's next turn; None where the template itself refuses the conversation.

    As `transformers.utils.chat_template_utils` has it, without tools and documents.
    """
    from jinja2 import TemplateError  # torch needs Jinja2 too
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.filters["tojson"], jinja.globals["raise_exception"] = to_json, refuse
    given: dict[str, Any] = {"messages": conversation, "tools": None, "documents": None}
    try:
        return jinja.from_string(template).render(**given, add_generation_prompt=True, bos_token=bos, eos_token=eos)
    except TemplateError:
        return None
