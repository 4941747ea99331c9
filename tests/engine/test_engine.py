"""Continuous batching: every text is the uncached loop's, whatever else is in the batch; nothing leaks."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from regpt.engine.engine import Engine
from regpt.engine.generate import generate
from regpt.engine.processing import SamplingOptions
from regpt.engine.reference import generate_uncached
from regpt.engine.request import Event, Request
from regpt.errors import UsageError, UserError
from regpt.model.transformer import Transformer
from regpt.text.open import open_tokenizer

CONFIG = replace(tiny.CONFIG, max_seq_len=40)
MODEL = tiny.build_model(config=CONFIG, dtype=torch.float32).eval()
V = CONFIG.vocab_size
GREEDY = SamplingOptions(temperature=0)
OPTIONS = [
    GREEDY,
    SamplingOptions(),
    SamplingOptions(0.8, 0, 0.9),
    SamplingOptions(1.2, 0),
    SamplingOptions(1.0, 20, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4, logit_bias=((3, 1.5),)),
]


def alone(request: Request, model: Transformer = MODEL) -> list[list[int]]:
    """The texts of a request by the loop without cache, cut after a stop token."""
    prompt = torch.tensor([list(request.prompt)] * request.n)
    new = generate_uncached(model, prompt, request.max_new_tokens, request.options, request.seed)[:, prompt.size(1) :]
    found = []
    for row in new.tolist():
        ends = [i for i, token in enumerate(row) if token in request.stop_ids]
        found.append(row[: ends[0] + 1] if ends else row)
    return found


@st.composite
def requests(draw) -> Request:
    shared = draw(st.sampled_from([[], [5] * 9, list(range(20))]))
    prompt = shared + draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=12))
    return Request(
        prompt,
        draw(st.integers(1, 8)),
        draw(st.sampled_from(OPTIONS)),
        draw(st.integers(0, 2**64 - 1)),
        n=draw(st.integers(1, 3)),
        stop_ids=draw(st.sampled_from([(), (7, 8, 9, 10, 11)])),
        top_logprobs=draw(st.sampled_from([0, 0, 3])),
        user=draw(st.sampled_from(["", "a", "b"])),
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(requests(), min_size=1, max_size=6),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([1, 7, 512]),
    st.booleans(),
)
def test_a_text_is_the_uncached_loops_in_any_batch_page_size_chunk_and_cache(given, rows, page, chunk, prefix):
    engine = Engine(MODEL, max_rows=rows, page_size=page, chunk_tokens=chunk, cache_tokens=120, prefix_cache=prefix)
    expected = [alone(request) for request in given]
    assert engine.run(given) == expected
    assert engine.run(given[::-1]) == expected[::-1]  # now with a filled prefix cache
    assert engine.stats().free_pages == engine.stats().pages


@pytest.mark.parametrize("family", tiny.FAMILY_CONFIGS)
def test_every_family_writes_in_batches_what_it_writes_without_a_cache(family):
    config = replace(tiny.FAMILY_CONFIGS[family], max_seq_len=32)
    model = tiny.build_model(config=config).eval()
    prompts = [torch.arange(start, start + size).tolist() for start, size in ((0, 1), (3, 9), (3, 14), (50, 5))]
    given = [Request(prompt, 17, OPTIONS[i % 3], i, n=1 + i % 2) for i, prompt in enumerate(prompts)]
    engine = Engine(model, max_rows=4, page_size=4, chunk_tokens=6)
    assert engine.run(given) == [alone(request, model) for request in given]
    assert engine.run(given) == [alone(request, model) for request in given]
    assert engine.stats().cached_tokens > 0


def test_greedy_texts_are_hugging_faces():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=40, n_embd=24, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = MODEL.state_dict()
    own = theirs.transformer.state_dict()
    for name in own:
        value = weights[name][: own[name].size(0)] if name == "wte.weight" else weights[name]
        own[name] = value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
    theirs.transformer.load_state_dict(own)
    prompt = torch.tensor([[1, 2, 3], [50, 60, 70]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    assert torch.equal(generate(MODEL, prompt, 30, options=GREEDY), expected)


def test_a_token_that_rounding_could_change_is_drawn_again(monkeypatch):
    """Noise of 10⁻⁶ on every batch's logits stands for rounding that depends on the batch."""
    given = [Request([i, 1], 30, SamplingOptions(1.0, 0), seed=i) for i in range(20)]
    expected = [alone(request) for request in given]
    logits, calls = MODEL.logits, []

    def rounded(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        source = torch.Generator().manual_seed(len(calls))
        calls.append(len(hidden))
        error = (torch.rand(found.shape, generator=source) - 0.5) * found.abs().amax() * 4e-5
        return found if len(hidden) == 1 else found + error  # the uncached forward is alone

    monkeypatch.setattr(MODEL, "logits", rounded)
    engine = Engine(MODEL, max_rows=20)
    assert engine.run(given) == expected
    assert engine.stats().recomputed > 0
    found = [Engine(MODEL, max_rows=20, exact=False).run(given) for _ in range(5)]
    assert any(one != expected for one in found), "this noise would have been harmless"


def test_a_first_token_that_is_drawn_again_is_known_before_the_next_one(monkeypatch):
    """Otherwise the second token follows from the one that was wrong, and its log-probability, too."""
    asked = Request([7, 1], 12, SamplingOptions(1.0, 0), seed=3)
    other = (alone(asked)[0][0] + 1) % MODEL.config.vocab_size
    engine = Engine(MODEL, max_rows=2)
    take, uncached = engine.take, engine.uncached
    first = (torch.tensor([[other, -1.0, True, True]], dtype=torch.float64),)
    monkeypatch.setattr(engine, "uncached", lambda one: uncached(one) if one.new else first)
    doubt = lambda one, numbers, others: take(one, numbers if one.new else [*numbers[:3], False], others)  # noqa: E731
    monkeypatch.setattr(engine, "take", doubt)
    (found,) = engine.run([asked])[0]
    (rest,) = alone(Request([7, 1, other], 11, SamplingOptions(1.0, 0), seed=3))
    assert found == [other, *rest]


# ---- life of a request -----------------------------------------------------------------------------------------------


def steps(engine: Engine, most: int = 500) -> list[Event]:
    events = []
    while engine.busy and most:
        events, most = events + engine.step(), most - 1
    assert not engine.busy
    return events


def test_keys_and_values_in_eight_bits_are_rounded_once_whatever_the_batch():
    """Also those of a prompt's own chunk: else a text would depend on where prompts are cut."""
    given = [Request([*range(i, i + 9)], 20, OPTIONS[i % 4], seed=i) for i in range(8)]
    narrow = [
        Engine(MODEL, max_rows=rows, page_size=page, chunk_tokens=chunk, narrow_cache=True)
        for rows, page, chunk in ((1, 16, 512), (5, 4, 3), (8, 16, 40))
    ]
    texts = [engine.run(given) for engine in narrow]
    assert texts[0] == texts[1] == texts[2] != Engine(MODEL, max_rows=8).run(given)
    assert not narrow[0].exact
    pages = narrow[0].pages
    assert pages.k.dtype == torch.float8_e4m3fn
    pages.write(0, 3, torch.full((CONFIG.n_head, CONFIG.n_embd // CONFIG.n_head), 1e4), torch.zeros(CONFIG.n_head, 1))
    k, v = pages.read(0, slice(3, 4))
    assert k.unique().tolist() == [448.0]  # not the NaN that 1e4 is in fp8
    assert not v.any()


@pytest.mark.parametrize("after", range(7))
def test_a_cancelled_request_frees_its_pages_at_once_also_while_its_prompt_is_read(after):
    engine = Engine(MODEL, max_rows=4, page_size=2, chunk_tokens=3)
    kept = engine.submit(Request([1, 2], 12, GREEDY))
    gone = engine.submit(Request(list(range(10)), 12, n=3))
    events = [event for _ in range(after) for event in engine.step()]
    engine.cancel(gone)
    used = engine.stats().pages - engine.stats().free_pages
    assert used == (engine.pages.needed(2 + 12 - 1) if after else 0)
    events += steps(engine)
    assert [one.finish_reason for one in events if one.request == gone and one.finish_reason] == ["cancelled"] * 3
    assert [one.token for one in events if one.request == kept] == alone(Request([1, 2], 12, GREEDY))[0]
    engine.cancel(gone)  # twice, or after its end, is nothing
    assert not engine.busy


def test_ten_thousand_cancels_leak_no_page():
    engine = Engine(MODEL, max_rows=4, page_size=4, chunk_tokens=8, cache_tokens=160)
    for i in range(10_000 // 20):
        numbers = [engine.submit(Request([i % V, k, 1, 2, 3], 1 + k % 5, n=1 + k % 2, user=str(k))) for k in range(20)]
        for _ in range(i % 3):
            engine.step()
        for number in numbers:
            engine.cancel(number)
        assert engine.stats().free_pages == engine.stats().pages
        assert engine.stats().running == engine.stats().waiting == 0


def test_users_take_turns():
    engine = Engine(MODEL, max_rows=1, prefix_cache=False)
    order = [engine.submit(Request([1], 1, user=user)) for user in "aaabbc"]
    ended = [event.request for event in steps(engine)]
    assert ended == [order[i] for i in (0, 3, 5, 1, 4, 2)]


def test_a_long_prompt_does_not_hold_up_the_others():
    engine = Engine(MODEL, max_rows=2, chunk_tokens=4, page_size=4)
    short = engine.submit(Request([1], 20, GREEDY))
    engine.step()
    engine.submit(Request(list(range(30)), 2, GREEDY))
    for _ in range(7):
        assert [event.request for event in engine.step()] == [short]


def test_texts_that_do_not_fit_into_the_cache_wait():
    engine = Engine(MODEL, max_rows=8, cache_tokens=48, page_size=8)
    given = [Request([i], 20, GREEDY) for i in range(6)]
    for request in given:
        engine.submit(request)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 4)
    steps(engine)
    assert engine.run(given) == [alone(request) for request in given]


def test_samples_of_one_prompt_read_it_once():
    engine = Engine(MODEL, page_size=4)
    engine.run([Request(list(range(17)), 3, n=5)])
    assert engine.stats().cached_tokens == 4 * 16


def test_a_page_that_was_given_up_is_never_found_again():
    """Its successors' pages stay in the table for a while: they must not be found after other tokens."""
    engine = Engine(MODEL, max_rows=1, cache_tokens=40, page_size=4)
    texts = [[a] * 4 + [b] * 4 + [9] * 4 + [c] for a in (1, 2, 3) for b in (1, 2) for c in (1, 2)]
    for _ in range(3):
        for text in texts:
            assert engine.run([Request(text, 4, GREEDY)]) == [alone(Request(text, 4, GREEDY))]


def test_events_carry_log_probabilities_of_the_model_and_the_likeliest_tokens():
    engine = Engine(MODEL)
    engine.submit(Request([1, 2, 3], 6, SamplingOptions(0.5, 3), seed=4, top_logprobs=4))
    events = steps(engine)
    text = torch.tensor([[1, 2, 3, *(event.token for event in events)]])
    with torch.no_grad():
        expected = MODEL(text)[0, 2:-1].log_softmax(-1)
    for event, row in zip(events, expected):
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        values, ids = row.topk(4)
        assert [i for i, _ in event.top] == ids.tolist()
        assert [p for _, p in event.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logits_that_are_no_numbers_end_their_text_alone(monkeypatch):
    engine = Engine(MODEL, exact=False)
    model = engine.decode_step.model  # on a CPU with a compiler one of its own, with the same weights
    logits = model.logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        return torch.where(found.argmax(-1, keepdim=True) == poison, math.nan, found)

    given = [Request([i], 8, GREEDY) for i in range(8)]
    poison = alone(given[0])[0][2]
    expected = [alone(request)[0] for request in given]
    monkeypatch.setattr(model, "logits", broken)
    numbers = [engine.submit(request) for request in given]
    events = steps(engine)
    for number, text in zip(numbers, expected):
        own = [event for event in events if event.request == number]
        until = text.index(poison) if poison in text else len(text)
        assert [event.token for event in own if event.token is not None] == text[:until]
        assert own[-1].finish_reason == ("error" if poison in text else "length")


class EvenTokens:
    """A structure that allows even tokens, and after `ends` of them nothing."""

    def __init__(self, ends: int):
        self.left = ends

    def allowed(self) -> torch.Tensor:
        return (torch.arange(V) % 2 == 0) & (self.left > 0)

    def accept(self, token: int) -> None:
        self.left -= 1


def test_a_structure_permits_nothing_else_and_fails_closed():
    engine = Engine(MODEL)
    free = engine.submit(Request([1], 9, GREEDY))
    bound = engine.submit(Request([1], 9, GREEDY, structure=lambda: EvenTokens(5)))
    events = steps(engine)
    own = [event for event in events if event.request == bound]
    assert [event.token % 2 for event in own[:-1]] == [0] * 5
    assert own[-1].token is None
    assert own[-1].finish_reason == "error"
    assert [event.token for event in events if event.request == free] == alone(Request([1], 9, GREEDY))[0]


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"prompt": []}, UsageError, "the prompt has no token"),
        ({"n": 0}, UsageError, "number of samples is 0"),
        ({"max_new_tokens": 0}, UsageError, "max-new-tokens is 0"),
        ({"max_new_tokens": 40}, UserError, "max-new-tokens 39 is the most that fits"),
        ({"prompt": [1] * 50}, UserError, "shorten the prompt to 39 tokens"),
        ({"prompt": [V]}, UsageError, f"token {V} is not in the model's vocabulary of {V}"),
        ({"options": SamplingOptions(logit_bias=((V, 1.0),))}, UsageError, f"token {V} is not"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"stop": ["a"]}, UsageError, "stop strings need a tokenizer"),
        ({"stop": [""]}, UsageError, "stop string is empty"),
        ({"top_logprobs": 101}, UsageError, "top-logprobs is 101"),
        ({"max_new_tokens": 33}, UserError, "the cache holds 32"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_sentence(values, error, said):
    engine = Engine(MODEL, cache_tokens=32)
    with pytest.raises(error, match=said):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 3, **values}))
    assert not engine.busy


def test_the_engine_leaves_the_models_mode_and_torchs_random_state_alone():
    MODEL.train()
    try:
        state = torch.get_rng_state()
        Engine(MODEL).run([Request([1], 5)])
        assert MODEL.training
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        MODEL.eval()


def test_stop_strings_are_found_across_tokens_and_never_shown():
    tokenizer = open_tokenizer("bytes")
    config = replace(CONFIG, vocab_size=257, max_seq_len=300)
    model = tiny.build_model(config=config, dtype=torch.float32).eval()
    options = SamplingOptions(1.0, 0, logit_bias=((tokenizer.eot, -math.inf),))
    given: Sequence[Request] = [Request([97], 200, options, seed=i) for i in range(8)]
    texts = [tokenizer.decode(one[0]) for one in Engine(model).run(given)]
    engine = Engine(model, tokenizer, max_rows=8)
    stops = [text[20:23] for text in texts]
    numbers = [engine.submit(replace(one, stop=[stop, text[90:]])) for one, stop, text in zip(given, stops, texts)]
    events = steps(engine)
    for number, text, stop in zip(numbers, texts, stops):
        own = [event for event in events if event.request == number]
        assert "".join(event.text for event in own) == text[: text.index(stop)]
        assert own[-1].finish_reason == "stop"
        assert len(own) < 60


def test_a_cache_that_memory_cannot_hold_is_one_sentence():
    for tokens in (10**12, 10**17):
        with pytest.raises(UserError, match=r"a cache of 1[0,]+ positions takes [\d,.]+ GiB, more than cpu has free"):
            Engine(MODEL, cache_tokens=tokens)
