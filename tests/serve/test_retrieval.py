"""Passages of the user's documents in chats over HTTP: in the prompt, in the usage, named in the answer."""

import json
from collections.abc import Iterator

import pytest
from serving import TEMPLATE, TOKENIZER, Serving, loaded, serving

from regpt.text.chat import ChatTemplate
from regpt.text.retrieved import Passage

FOUND = Passage("it eats", "a.md, line 3"), Passage("x" * 30, "b.md, line 1"), Passage("yes", "c.csv, row 2")
SOURCES = [{"text": "it eats", "place": "a.md, line 3"}, {"text": "yes", "place": "c.csv, row 2"}]
ASK = {"max_tokens": 4, "seed": 7, "messages": [{"role": "user", "content": "okapi"}]}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving([loaded()], retrieve=lambda question: list(FOUND) if question == "okapi" else []) as running:
        yield running


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """With the passages that leave half of the model's 96 tokens free."""
    content = "[1] it eats\n\n[2] yes\n\nokapi"
    found = ChatTemplate(TEMPLATE, TOKENIZER).encode([{"role": "user", "content": content}])
    assert len(found) <= 48
    return found


def test_passages_are_in_the_prompt_its_usage_and_the_answer(served, prompt):
    found = served.post("chat/completions", **ASK).json()
    alone = served.complete(prompt=prompt, max_tokens=4, seed=7)
    assert found["choices"][0]["message"]["content"] == alone["choices"][0]["text"]
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["regpt"] == {"seed": 7, "sources": SOURCES}
    other = served.post("chat/completions", **ASK | {"messages": [{"role": "user", "content": "who"}]}).json()
    assert other["regpt"]["sources"] == []
    assert "sources" not in alone["regpt"]  # of a text, nothing is retrieved


def test_a_stream_names_them_first_and_a_response_at_its_end(served, prompt):
    text = served.post("chat/completions", **ASK, stream=True).text
    first, second = (json.loads(line[6:]) for line in text.split("\n\n")[:2])
    assert first["regpt"] == {"sources": SOURCES}
    assert "regpt" not in second
    found = served.post("responses", input="okapi", max_output_tokens=4).json()
    assert found["regpt"]["sources"] == SOURCES
    assert found["usage"]["input_tokens"] == len(prompt)


def test_an_explanation_is_of_the_prompt_with_them(served, prompt):
    found = served.post("explain", seed=7, messages=ASK["messages"]).json()
    assert found["prompt_token_ids"] == prompt
