"""`regpt serve`: start, refusals, signals, many streams at once."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from serving import MODEL, TOKENIZER, Serving, loaded, serving, text_of, written
from test_complaints import Held, until

import tiny
from regpt.__main__ import main
from regpt.engine.request import Event, Request
from regpt.serve import server as server_module
from regpt.serve.server import named_models, open_socket, read_template
from regpt.serve.worker import Limits, TextJob, Worker
from regpt.text.chat import TEMPLATES, ChatTemplate


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving([loaded()]) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(
        tmp_path_factory.mktemp("serve") / "small" / "checkpoints" / "step-00000003", MODEL, TOKENIZER
    )


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = main(["serve", *map(str, args)])
    return code, capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence(capsys, model):
    with open_socket("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        code, said = refusal(capsys, model, "--port", port)
    assert code == 1
    assert re.fullmatch(rf"regpt: cannot serve at port {port} of 127.0.0.1 \(.*\); choose another .*\n", said)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_a_token(capsys, model, monkeypatch, host):
    monkeypatch.delenv("REGPT_TOKEN", raising=False)
    code, said = refusal(capsys, model, "--host", host)
    assert code == 2
    assert "--token" in said


def test_bad_arguments_are_one_sentence(capsys, model):
    for args, code, part in (
        ([], 2, "MODEL is missing"),
        (["no/such/model"], 2, "does not exist"),
        ([model, model], 2, "two models are called 'small:3'"),
        ([model, "--chat-template", "nowhere.jinja"], 2, "is not a file"),
        ([model, "--port", "70000"], 2, "must be at most"),
    ):
        found = refusal(capsys, "--port", "0", *args)
        assert found[0] == code, found
        assert part in found[1]
        assert found[1].count("\n") == 1


def test_models_have_short_names():
    names = ["runs/small", "runs/small/checkpoints/step-00000120", "a/b.gguf", "x=runs/small", "openai-community/gpt2"]
    assert list(named_models(names)) == ["small", "small:120", "b", "x", "gpt2"]


def test_help_imports_neither_fastapi_nor_torch():
    code = (
        "import sys; from regpt.__main__ import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'fastapi', 'uvicorn', 'jinja2'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(os.name != "posix", reason="signals of Windows end a process at once")
def test_a_server_of_its_own_prints_its_address_and_finishes_streams_when_terminated(model):
    command = [sys.executable, "-m", "regpt", "serve", str(model), "--port", "0", "--chat-template", "bare"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving small:3 on ")
            said = re.fullmatch(r"export OPENAI_BASE_URL=(http://127\.0\.0\.1:\d+/v1) .*\n", process.stdout.readline())
            assert said
            asked = {"model": "small:3", "prompt": "abc", "max_tokens": 80, "seed": 1, "logit_bias": {"256": -100}}
            text = ""
            with httpx.stream("POST", f"{said[1]}/completions", json={**asked, "stream": True}, timeout=60) as answer:
                for line in answer.iter_lines():
                    if not text:
                        process.send_signal(signal.SIGTERM)
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            assert len(text) > 60
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_the_second_signal_ends_a_server_at_once():
    with serving([loaded()]) as running:
        held = Held(running)
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 60, "stream": True, "logit_bias": {"256": -100}}
        with running.http.stream("POST", "/v1/completions", json=asked) as answer:
            held.let(2)
            lines = answer.iter_lines()
            next(lines)
            running.server.handle_exit(signal.SIGTERM, None)
            running.thread.join(0.3)
            assert running.thread.is_alive()  # the stream is not finished
            running.server.handle_exit(signal.SIGTERM, None)
            running.thread.join(20)
            assert not running.thread.is_alive()
            held.free()
            with pytest.raises(httpx.HTTPError):
                list(lines)


def test_the_engine_has_ended_when_a_killed_server_returns(monkeypatch):
    """A step of C++ that Python's end interrupts would abort the process."""
    made, entered, codes = [], threading.Event(), []
    real = server_module.make_server
    monkeypatch.setattr(server_module, "make_server", lambda *given: made.append(real(*given)) or made[0])
    model, ready = loaded(), threading.Event()

    def slow_step() -> list:
        entered.set()
        threading.Event().wait(0.3)
        return []

    model.engine.step = slow_step
    with open_socket("127.0.0.1", 0) as bound:
        run = threading.Thread(
            target=lambda: codes.append(server_module.serve([model], bound, Limits(), "", ready.set, 0))
        )
        run.start()
        assert ready.wait(20)
        asking = threading.Thread(target=post_and_ignore, args=[f"{server_module.url_of(bound)}/v1/completions"])
        asking.start()
        assert entered.wait(20)
        made[0].handle_exit(signal.SIGTERM, None)
        made[0].handle_exit(signal.SIGTERM, None)
        run.join(20)
        asking.join(20)
    assert codes == [130]
    assert not [one for one in made[0].app.all_workers() if one.thread.is_alive()]


def post_and_ignore(url: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, json={"model": "tiny", "prompt": "a"}, timeout=20)


@pytest.mark.parametrize(("streams", "jobs"), [(True, 2), (True, 20), (False, 20)])
def test_tokens_of_many_streams_go_out_together_and_their_first_and_last_at_once(monkeypatch, streams, jobs):
    """Of few streams each one at once; of many after a pause of a millisecond each; unread ones at the end."""
    clock = [0.0]
    monkeypatch.setattr("regpt.serve.worker.time.perf_counter", lambda: clock[0])
    worker = Worker.__new__(Worker)
    worker.unsent, worker.tell, worker.taken = {}, lambda action: action(), threading.Event()
    worker.loop = SimpleNamespace(call_soon=lambda action, *given: action(*given))
    given = [TextJob([Request([1], 9)]) for _ in range(jobs)]
    worker.jobs = {number: (job, 0) for number, job in enumerate(given)}
    seen = []
    for step in range(6):
        for number, job in enumerate(given):
            job.streams, job.numbers[number] = streams, 1
        last = "length" if step == 5 else None
        worker.deliver([Event(number, 0, step, finish_reason=last) for number in range(jobs)])
        seen.append({len(job.items) for job in given})
        clock[0] += 0.009
    assert seen == [
        {n} for n in ([1, 2, 3, 4, 5, 6] if jobs == 2 else [1, 1, 1, 4, 4, 6] if streams else [1] * 5 + [6])
    ]
    assert [item.token for _, item in given[0].items] == list(range(6))
    assert not worker.unsent


def test_64_streams_at_once_are_each_what_generation_in_this_process_gives(served):
    prompts = [f"prompt {i} " * (1 + i % 3) for i in range(64)]

    async def one(http: httpx.AsyncClient, i: int) -> str:
        body = {"model": "tiny", "prompt": prompts[i], "max_tokens": 12, "seed": i, "stream": True, "user": f"{i % 5}"}
        text = ""
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(one(http, i) for i in range(64)))

    expected = [text_of(written(prompt, max_new_tokens=12, seed=i)[0]) for i, prompt in enumerate(prompts)]
    assert asyncio.run(all_of_them()) == expected
    served.wait_until_free()


def test_a_body_that_is_no_object_or_too_large_is_refused(served):
    kind = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"model": "\\ud800"}', b"1" * 9000):
        answer = served.http.post("/v1/completions", content=body, headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json"), body[:20]
    answer = served.http.post("/v1/completions", content=b" " * (5 << 20), headers=kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [257]),
        ("prompt", [-1]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", ["a", 1]),
        ("prompt", {}),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("n", 0),
        ("n", 65),
        ("temperature", -0.1),
        ("temperature", 1e400),
        ("repetition_penalty", 5e-324),
        ("top_p", 0),
        ("top_p", 1.1),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["a"] * 17),
        ("seed", -1),
        ("seed", 2**64),
        ("logit_bias", {"257": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": 101}),
        ("logprobs", 21),
        ("logprobs", True),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_wrong_value_is_a_400_that_names_its_field(served, field, value):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, field: value}
    content = json.dumps(body).replace("Infinity", "1e400")
    answer = served.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert answer.json()["error"]["message"].startswith(field)


def test_bare_is_the_messages_one_after_another_and_plain_what_finetune_means_by_it():
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    bare, plain = (ChatTemplate(read_template(name), TOKENIZER) for name in ("bare", "plain"))
    assert TOKENIZER.decode(bare.encode(messages)) == "a\nb\n"
    assert plain.source == TEMPLATES["plain"] != bare.source


def test_a_broken_engine_is_said_to_everyone_and_by_health():
    with serving([loaded()]) as running:

        def broken():
            raise RuntimeError("out of memory")

        running.engine.step = broken
        first, second = (running.post("completions", prompt="a", max_tokens=2) for _ in range(2))
        assert (first.status_code, second.status_code) == (500, 503)
        assert "out of memory" in first.json()["error"]["message"]
        assert running.http.get("/health").status_code == 503
        until(lambda: not running.server.config.app.workers[0].thread.is_alive())


def test_responses_are_stateless_text_whole_and_streamed(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    asked = {"model": "tiny", "input": "Hi", "instructions": "be brief", "max_output_tokens": 12, "store": False}
    asked |= {"extra_body": {"seed": 3, "logit_bias": {"256": -100}}}
    whole = client.responses.create(**asked)
    chat = served.post(
        "chat/completions",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}],
        max_tokens=12,
        seed=3,
        logit_bias={"256": -100},
    ).json()
    assert whole.output_text == chat["choices"][0]["message"]["content"]
    assert (whole.status, whole.incomplete_details.reason, whole.usage.output_tokens) == (
        "incomplete",
        "max_output_tokens",
        12,
    )
    found = list(client.responses.create(stream=True, **asked))
    assert [one.sequence_number for one in found] == list(range(len(found)))
    assert "".join(one.delta for one in found if one.type == "response.output_text.delta") == whole.output_text
    assert (found[0].type, found[-1].type) == ("response.created", "response.incomplete")
    assert found[-1].response.output_text == whole.output_text
    for field, value in (("store", True), ("previous_response_id", "resp_1"), ("tools", [{"type": "web_search"}])):
        error = served.refused("responses", input="Hi", **{field: value})
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    client.close()
