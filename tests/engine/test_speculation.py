"""Speculation: whatever a draft proposes, the texts are those without it."""

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

import tiny
from engine.test_engine import CONFIG, GREEDY, MODEL, OPTIONS, V, alone, steps
from regpt.engine.decode import Step
from regpt.engine.engine import Engine
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Event, Request
from regpt.engine.speculate import NGRAMS, NGrams, look_up
from regpt.errors import UsageError
from regpt.model.transformer import Transformer
from regpt.text.open import open_tokenizer

SMALL = tiny.build_model(config=replace(CONFIG, n_layer=1), dtype=torch.float32).eval()


class Proposer(NGrams):
    """Proposes what `follow` gives for a text's tokens."""

    def __init__(self, follow):
        self.follow = follow

    def propose(self, texts, most):
        return [self.follow(one.tokens, n)[:n] for one, n in zip(texts, most)]


DRAFTS = {
    "ngram": NGrams(),
    "same": MODEL,
    "small": SMALL,
    "odd": Proposer(lambda tokens, n: [(tokens[-1] * 7 + i) % V for i in range(n - len(tokens) % 3)]),
}


def some_requests(seed: int) -> list[Request]:
    source = random.Random(seed)
    found = []
    for _ in range(source.randint(2, 5)):
        prompt = source.choice([[], [5] * 9, list(range(20))]) + [
            source.randrange(V) for _ in range(source.randint(1, 9))
        ]
        found.append(
            Request(
                prompt,
                source.choice([1, 3, 8, CONFIG.max_seq_len - len(prompt)]),  # to the model's end, too
                source.choice(OPTIONS),
                source.randrange(2**64),
                n=source.randint(1, 3),
                stop_ids=source.choice([(), (7, 8, 9, 10, 11)]),
                top_logprobs=source.choice([0, 0, 3]),
                user=source.choice("ab"),
            )
        )
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_the_uncached_loops_with_any_draft_batch_page_size_and_number_of_proposals(seed):
    given = some_requests(seed)
    rows, page, chunk, most = ((1, 16, 512, 4), (3, 3, 7, 1), (8, 1, 1, 2), (8, 4, 512, 9))[seed % 4]
    expected = [alone(request) for request in given]
    for draft in DRAFTS.values():
        engine = Engine(
            MODEL,
            max_rows=rows,
            page_size=page,
            chunk_tokens=chunk,
            cache_tokens=120,
            draft=draft,
            draft_tokens=most,
        )
        assert engine.run(given) == expected
        assert engine.run(given[::-1]) == expected[::-1]  # now with a filled prefix cache
        assert engine.stats().free_pages == engine.stats().pages


@pytest.mark.parametrize("family", tiny.FAMILY_CONFIGS)
def test_every_family_proposes_to_itself_and_is_always_right(family):
    config = replace(tiny.FAMILY_CONFIGS[family], max_seq_len=32)
    model = tiny.build_model(config=config).eval()
    given = [Request(list(range(i, 3 * i + 1)), 17, OPTIONS[i], i) for i in range(5)]
    engine = Engine(model, page_size=4, draft=model, draft_tokens=3)
    expected = [alone(request, model) for request in given]
    assert engine.run(given) == expected
    assert engine.run(given) == expected  # now with a filled prefix cache
    assert engine.stats().accepted == engine.stats().proposed > 0
    assert engine.stats().steps == 2 * 4  # the first with the prompts and five tokens


def events_of(engine: Engine, given: Sequence[Request]) -> dict[tuple[int, int], list[Event]]:
    first = engine.next_id + 1
    for request in given:
        engine.submit(request)
    found: dict[tuple[int, int], list[Event]] = {}
    for event in steps(engine):
        found.setdefault((event.request - first, event.choice), []).append(event)
    return found


@pytest.mark.parametrize("kind", DRAFTS)
def test_log_probabilities_pieces_stop_strings_and_ends_are_those_without_a_draft(kind):
    tokenizer = open_tokenizer("bytes")
    config = replace(CONFIG, vocab_size=257, max_seq_len=100)
    model = tiny.build_model(config=config, dtype=torch.float32).eval()
    draft = {"same": model, "small": tiny.build_model(config=replace(config, n_layer=1), dtype=torch.float32)}
    options = SamplingOptions(0.5, 0, frequency_penalty=1.0, logit_bias=((tokenizer.eot, -math.inf),))
    given = [Request([97, i], 60, options, seed=i, top_logprobs=i % 3) for i in range(6)]
    plain = events_of(Engine(model, tokenizer, max_rows=4), given)
    texts = [tokenizer.decode([event.token or 0 for event in plain[i, 0]]) for i in range(6)]
    given = [replace(one, stop=[text[20 + i : 22 + i]]) for i, (one, text) in enumerate(zip(given, texts))]
    plain = events_of(Engine(model, tokenizer, max_rows=4), given)
    found = events_of(Engine(model, tokenizer, max_rows=4, draft=draft.get(kind, DRAFTS[kind])), given)
    assert {event.finish_reason for events in plain.values() for event in events} == {None, "stop"}
    for key, events in plain.items():
        assert [one._replace(request=0, logprob=0, top=()) for one in found[key]] == [
            one._replace(request=0, logprob=0, top=()) for one in events
        ]
        for ours, theirs in zip(found[key], events):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-4)


def test_what_is_proposed_and_drawn_is_counted():
    given = [Request([1, 2, 3 + i], 20, SamplingOptions(), seed=i) for i in range(4)]
    texts = {tuple(one.prompt): [*one.prompt, *alone(one)[0]] for one in given}
    right = Proposer(lambda tokens, n: texts[tuple(tokens[:3])][len(tokens) :][:n])
    wrong = Proposer(lambda tokens, n: [(token + 1) % V for token in right.follow(tokens, n)])
    half = Proposer(lambda tokens, n: right.follow(tokens, 2) + wrong.follow([*tokens, 0, 0], n - 2))
    for draft, per_step in ((right, 4), (wrong, 0), (half, 2)):
        engine = Engine(MODEL, draft=draft, draft_tokens=4)
        assert engine.run(given) == [alone(one) for one in given]
        stats = engine.stats()
        assert stats.new_tokens == 4 * 20
        assert stats.steps == math.ceil(19 / (1 + per_step))
        if per_step != 2:
            assert stats.accepted == (stats.proposed if per_step else 0)
        assert stats.accepted == 4 * (19 - stats.steps)  # each step of a text draws one token more


class Turns:
    """A structure in which even and odd tokens take turns."""

    def __init__(self):
        self.turn = 0

    def allowed(self) -> torch.Tensor:
        return torch.arange(V) % 2 == self.turn

    def accept(self, token: int) -> None:
        self.turn = 1 - self.turn


def test_texts_slide_past_the_models_length_and_structures_hold_next_to_drafts():
    given = [Request([1, 2], 60, SamplingOptions(), seed=i, slide=True) for i in range(3)]
    bound = [Request([i], 9, structure=Turns) for i in range(3)]
    plain, found = (Engine(MODEL, draft=draft).run([*given, *bound]) for draft in (None, SMALL))
    assert found == plain
    assert [[token % 2 for token in text] for (text,) in found[3:]] == [[0, 1] * 4 + [0]] * 3
    assert Engine(MODEL, draft=SMALL, max_rows=1).run(bound) == plain[3:]


def test_a_token_that_rounding_could_change_is_drawn_again_before_proposals_are_compared():
    """Noise of 10⁻⁶ on every batch's logits stands for rounding that depends on the batch."""
    given = [Request([i, 1], 30, SamplingOptions(1.0, 0), seed=i) for i in range(20)]
    expected = Engine(MODEL).run(given)
    for draft in (MODEL, NGrams()):
        engine, calls = Engine(MODEL, max_rows=20, draft=draft), []
        logits = engine.decode_step.logits

        def rounded(hidden: torch.Tensor) -> torch.Tensor:
            found = logits(hidden)  # noqa: B023
            source = torch.Generator().manual_seed(len(calls))  # noqa: B023
            calls.append(len(hidden))  # noqa: B023
            error = (torch.rand(found.shape, generator=source) - 0.5) * found.abs().amax(-1, keepdim=True) * 4e-5
            return found if len(hidden) == 1 else found + error  # the uncached forward is alone

        engine.decode_step.logits = rounded
        assert engine.run(given) == expected
        assert engine.stats().recomputed > 0


@pytest.mark.parametrize("after", range(5))
def test_a_cancelled_request_frees_its_pages_and_leaves_the_others(after):
    engine = Engine(MODEL, max_rows=4, page_size=2, chunk_tokens=5, draft=SMALL)
    kept = engine.submit(Request([1, 2], 12, GREEDY))
    gone = engine.submit(Request(list(range(10)), 12, n=3))
    events = [event for _ in range(after) for event in engine.step()]
    engine.cancel(gone)
    events += steps(engine)
    assert [one.token for one in events if one.request == kept] == alone(Request([1, 2], 12, GREEDY))[0]
    assert [one.finish_reason for one in events if one.request == gone and one.finish_reason] == ["cancelled"] * 3
    assert engine.stats().free_pages == engine.stats().pages


def test_tokens_after_proposals_have_the_models_distribution():
    """Of the second new token, which is proposed or replaces what was: summed over the first."""
    options = SamplingOptions(1.3, 0)
    with torch.no_grad():
        first = (MODEL(torch.tensor([[3, 1]]))[0, -1] / 1.3).softmax(-1)
        texts = torch.tensor([[3, 1, token] for token in range(V)])
        second = first @ (MODEL(texts)[:, -1] / 1.3).softmax(-1)
    engine = Engine(MODEL, max_rows=256, draft=SMALL, draft_tokens=2)
    counts = Counter(text[1] for (text,) in engine.run([Request([3, 1], 4, options, seed) for seed in range(2000)]))
    stats = engine.stats()
    assert 0.1 < stats.accepted / stats.proposed < 0.95  # both ways occur
    often = [token for token in range(V) if second[token] > 5 / 2000]
    seen, wanted = [counts[token] for token in often], [2000 * float(second[token]) for token in often]
    assert chisquare([*seen, 2000 - sum(seen)], [*wanted, 2000 - sum(wanted)]).pvalue > 1e-3


def test_what_followed_the_last_tokens_before_is_proposed():
    source = random.Random(0)
    for _ in range(300):
        tokens = [source.randrange(3) for _ in range(source.randint(1, 30))]
        found = look_up(tokens, 5)
        ends = [
            (size, at)
            for size in NGRAMS
            for at in range(len(tokens) - size - 1, -1, -1)
            if tokens[at : at + size] == tokens[-size:]
        ]
        text = list(tokens)
        for _ in range(5 if ends else 0):
            text.append(text[len(text) - (len(tokens) - sum(ends[0]))])  # the text has that period
        assert found == text[len(tokens) :]
    assert look_up([70000, 9, 4, 70000, 9], 2) == [4, 70000]
    assert look_up([1, 2, 1, 2], 0) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(CONFIG, vocab_size=98), "the draft has 98 tokens, the model 97; give a draft of the same tokenizer"),
        (replace(CONFIG, max_seq_len=30), "the draft reads 30 tokens, the model 40; give one that reads as many"),
    ],
)
def test_a_draft_that_cannot_read_the_texts_is_refused(config, said):
    with pytest.raises(UsageError, match=said):
        Engine(MODEL, draft=Transformer(config))


@pytest.mark.parametrize("kind", DRAFTS)
def test_proposals_that_are_read_as_rows_of_a_decode_step_give_the_same_texts(monkeypatch, kind):
    """As on CUDA, where such a step is a graph: here it is computed as it is."""
    monkeypatch.setattr(Step, "__call__", lambda step, n, needs, alone=None, longest=0: step.compute(n, needs))
    used = []
    for seed in range(4):
        whole = some_requests(seed)
        plain = [one for one in whole if not one.options.penalized and not one.options.logit_bias]
        for given in (whole, plain):
            engine = Engine(MODEL, max_rows=4, page_size=4, draft=DRAFTS[kind], draft_tokens=3)
            engine.decode_step.graphs = True
            assert engine.run(given) == [alone(one) for one in given]
            used.append(engine.decode_step.several is not None)
    assert kind == "ngram" or any(used)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ngram", "same", "small"])
def test_texts_on_a_gpu_with_captured_drafts_are_those_without(kind):
    """Rows whose proposals are complete leave the draft's batch, and their rows of its graph are cleared."""
    models = {name: copy.deepcopy(one).cuda() for name, one in (("same", MODEL), ("small", SMALL))}
    draft = models.get(kind, NGrams())
    given = [replace(one, max_new_tokens=CONFIG.max_seq_len - len(one.prompt)) for one in some_requests(3)]
    plain = Engine(models["same"]).run(given)
    engine = Engine(models["same"], max_rows=8, draft=draft, draft_tokens=5)
    assert engine.run(given) == plain
    assert engine.run(given[::-1]) == plain[::-1]
    if kind == "same":
        assert engine.stats().accepted > 0.9 * engine.stats().proposed  # an end may cut the last ones
