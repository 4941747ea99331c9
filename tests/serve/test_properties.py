"""Any stop strings over HTTP, and whatever the OpenAPI description allows or forbids: no answer is a 5xx."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import TOKENIZER, Serving, loaded, serving, written

from regpt.engine.processing import SamplingOptions

EXAMPLES = 6  # of each path
LIKELY = dict.fromkeys(TOKENIZER.encode("aé中🎭"), 60) | {256: -100}  # bytes of one to four a character
WRITING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
SMALL = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "n": 2}


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving([loaded()]) as running:
        yield running


def streamed(answer: Any) -> str:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 50), at=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=3))
def test_a_stream_is_the_whole_text_cut_at_its_first_stop_string(served, seed, at):
    options = SamplingOptions(top_k=0, logit_bias=tuple((token, float(bias)) for token, bias in LIKELY.items()))
    (ids,) = written("x", max_new_tokens=40, seed=seed, options=options)
    text = b"".join(map(TOKENIZER.token_bytes, ids)).decode("utf-8", "replace")
    stop = [one for start, n in at if (one := text[start : start + n])] + ["never"]
    ends = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
    bias = {str(token): value for token, value in LIKELY.items()}
    asked = {"prompt": "x", "max_tokens": 40, "seed": seed, "logit_bias": bias, "stop": stop}
    expected = (text[: min(ends)[1]], "stop") if ends else (text, "length")
    whole = served.complete(**asked)["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == expected
    assert streamed(served.post("completions", **asked, stream=True)) == expected[0]


def description(running: Serving) -> dict:
    """The server's own, with its model's name and few tokens, so that what is generated is also answered."""
    found = running.http.get("/openapi.json").json()
    for path in found["paths"].values():
        if "post" in path:
            properties = path["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
            properties["model"] = {"const": "tiny"}
            for name in SMALL.keys() & properties.keys():
                properties[name]["anyOf"][0]["maximum"] = SMALL[name]
    return found


def test_the_description_has_every_field_with_its_limits(served):
    paths = served.http.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["model", "prompt"]
    assert schema["additionalProperties"] is False
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert schema["properties"]["top_p"] == {"anyOf": [number, {"type": "null"}], "default": 1.0}
    assert schema["properties"]["best_of"] == {"enum": [None, 1]}
    for name, one in schema["properties"].items():
        assert "anyOf" in one or "enum" in one, name


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_nothing_that_is_described_or_forbidden_ends_in_a_server_error(served, mode):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(description(served))
    statuses: Counter[tuple[str, int]] = Counter()
    for operation in (one.ok() for one in schema.get_all_operations()):
        if mode == "NEGATIVE" and operation.method == "get":
            continue  # nothing can be wrong with it
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
        @given(case=cases)
        def check(case: Any) -> None:
            response = case.call(base_url=served.url)
            statuses[case.path, response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}

        check()
    served.wait_until_free()
    if mode == "POSITIVE":
        assert min(statuses[path, 200] for path in WRITING) > 0
