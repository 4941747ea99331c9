"""A GGUF file against llama.cpp itself, from the pip package xllamacpp: tokens, greedy continuations, probabilities,
chat template."""

import json
import random
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from regpt.engine.generate import generate
from regpt.engine.processing import SamplingOptions
from regpt.errors import UserError, import_extra
from regpt.hf.gguf import GGUFFile
from regpt.hf.gguf_archs import ARCHS
from regpt.model.ops import linear_cross_entropy
from regpt.model.transformer import Transformer
from regpt.text.chat import chat_environment
from regpt.text.library import LibraryTokenizer
from regpt.text.sentences import SENTENCES
from regpt.text.tokenizer import Tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, STRINGS = 20, 24, 100, 10_000
PROBABILITIES = 4 << 20  # numbers that llama.cpp sends as text, at most, with one position of each prompt at least
# Largest KL divergence in float32, and the largest gap between our two likeliest tokens that llama.cpp may order the
# other way. It looks GELU up in a table of half precision: log-probabilities of likely tokens of tiny GPT-2s of random
# weights differ from ours by up to 2.0e-3, of Gemmas 8.9e-3 (measured: docs/log.md), so that two of them may cross
# within twice that.
GELU = {name for name, arch in ARCHS.items() if arch.activation == "gelu_tanh"}
LARGEST_KL = {arch: 1e-4 if arch in GELU else 1e-5 for arch in ARCHS}
LARGEST_TIE = dict.fromkeys(ARCHS, 1e-5) | {"gpt2": 5e-3, "gemma3": 2e-2}
TIES = 20  # of one prompt, after which its tokens are not compared any further
LOSS_TOKENS = 1 << 15
FORCED = 1e4  # added to a logit that then wins
Conversation = list[dict[str, str]]


def turns(*contents: str, system: str = "") -> Conversation:
    """A conversation whose turns alternate between user and assistant."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS: list[Conversation] = [
    turns("Hello"),
    turns("  spaces around, two lines\nand an end  \n"),
    turns("Wie geht's? 你好 🙂 <b>&amp;</b> {{ braces }} {% raw %}"),
    turns("What is 2 + 2?", "4", "And 3 + 3?"),
    turns("one", "two", "three", "four", " five "),
    turns("Hello", system="You are helpful."),
    turns("a", "b\n\nc", "d", system="  Answer in one word.\n"),
]


class LlamaServer:
    """llama.cpp's server with one model, and adapters on it, in this process, on the CPU: caches in float32, no flash
    attention, greedy.

    Raises:
        UserError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, max_seq_len: int, lora: Path | None = None) -> None:
        xllamacpp = import_extra("xllamacpp", "the check needs llama.cpp", "gguf")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), max_seq_len, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_gpu_layers, params.warmup, params.verbosity = 0, False, -1
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        params.cpuparams.n_threads = torch.get_num_threads()
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp cannot load {str(path)!r}: {error}") from None

    def ask(self, route: str, **body: Any) -> Any:
        # Its own address on this machine, also where a proxy is set.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(self.server.listening_address + route, data, headers)) as answer:
            return json.load(answer)

    def complete(self, ids: list[int], n: int, **options: Any) -> Any:
        return self.ask("/completion", prompt=ids, n_predict=n, temperature=0.0, samplers=["temperature"], **options)

    def greedy(self, ids: list[int], n: int) -> list[int]:
        return self.complete(ids, n, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: list[int], n_vocab: int, whole: int) -> Tensor:
        """(V,) float64 of the token after `ids`. The server tells those of tokens that end a character only, so `whole`
        is drawn; the probabilities are those without that."""
        options = {"n_probs": n_vocab, "cache_prompt": False, "logit_bias": [[whole, FORCED]]}
        (position,) = self.complete(ids, 1, **options)["completion_probabilities"]
        found = torch.full((n_vocab,), -torch.inf, dtype=torch.float64)
        for entry in position["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def render(self, conversation: Conversation) -> str | None:
        """The prompt for the assistant's next turn by the file's chat template; None where that refuses."""
        try:
            return self.ask("/apply-template", messages=conversation)["prompt"]
        except urllib.error.HTTPError:
            return None

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]


@dataclass(frozen=True)
class LlamaCheck:
    """llama.cpp's answers against ours.

    Attributes:
        tokens, equal_tokens: greedy tokens that were compared; those that are equal. After a different one both
            continue from llama.cpp's.
        gap: largest difference of our log-probabilities of two different ones, 0 without any.
        kl, mean_kl: largest and mean KL divergence (nats) of llama.cpp's next token from ours, over `positions`: ends
            of prompts, and before each different token.
        strings, different: texts that were tokenized, and the first that became other tokens.
        shift: largest difference of a log-probability of our two likeliest tokens at the positions.
        chat: what of the chat template was compared.
    """

    tokens: int
    equal_tokens: int
    gap: float
    kl: float
    mean_kl: float
    positions: int
    strings: int
    different: str | None
    shift: float = 0.0
    chat: "ChatCheck" = field(default_factory=lambda: ChatCheck())


@dataclass(frozen=True)
class ChatCheck:
    """Renderings of the file's chat template; none without one.

    Attributes:
        equal: conversations that both render alike.
        refused: those that the template refuses here; llama.cpp may render them in another form.
        different: the first that differs, with our and llama.cpp's rendering.
    """

    equal: int = 0
    refused: int = 0
    different: tuple[Conversation, str, str | None] | None = None


@dataclass(frozen=True)
class Comparison:
    """Greedy tokens after one prompt.

    Attributes:
        tokens: compared ones.
        differing: the tokens before each different one, and the gap there.
    """

    tokens: int
    differing: list[tuple[list[int], float]]


@torch.no_grad()
def check_with_llama_cpp(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    strings: int = STRINGS,
    new_tokens: int = NEW_TOKENS,
    lora: Path | None = None,
) -> LlamaCheck:
    """Compare llama.cpp's reading of `path`, with the adapters `lora` on it, with `model`, which was opened from them,
    in float32."""
    longest = model.config.max_seq_len
    server = LlamaServer(path, longest, lora)
    prompts = [*check_prompts(tokenizer, min(PROMPT_TOKENS, longest // 2))]
    n = min(new_tokens, longest - max(map(len, prompts)))
    specials = {i for i, size in enumerate(tokenizer.byte_lengths()) if not size}
    bound = LARGEST_TIE[GGUFFile(path).metadata["general.architecture"]]
    greedy_tokens = [compared(model, server, prompt, n, specials, bound) for prompt in prompts]
    differing = [one for found in greedy_tokens for one in found.differing]
    each = max(1, min(8, PROBABILITIES // PROMPTS // model.config.vocab_size))
    texts = [ids[: len(ids) - k] for ids in prompts for k in range(min(each, len(ids)))]
    texts += [ids for ids, _ in differing[: len(texts)]]
    whole = tokenizer.encode("a")[0]
    found = [divergence(model, server.log_probabilities(ids, tokenizer.n_vocab, whole), ids) for ids in texts]
    kl, shift = (torch.tensor(values) for values in zip(*found))
    given = check_strings(
        strings, normalized=isinstance(tokenizer, LibraryTokenizer) and bool(tokenizer.spec.normalizer)
    )
    different = next((text for text in given if server.tokenize(text) != tokenizer.encode(text)), None)
    tokens = sum(found.tokens for found in greedy_tokens)
    gap = max((gap for _, gap in differing), default=0.0)
    equal, divergences = tokens - len(differing), (float(kl.max()), float(kl.mean()), len(kl))
    chat = check_chat(server, GGUFFile(path).metadata)
    return LlamaCheck(tokens, equal, gap, *divergences, strings, different, float(shift.max()), chat)


def compared(
    model: Transformer, server: LlamaServer, prompt: list[int], n: int, specials: set[int], bound: float
) -> Comparison:
    """Up to `n` tokens after `prompt`; after a different one both continue from llama.cpp's, unless the gap is above
    `bound`."""
    ids, end, differing = prompt, len(prompt) + n, []
    while len(ids) < end and len(differing) < TIES:
        ours, theirs = greedy(model, ids, end - len(ids)), server.greedy(ids, end - len(ids))
        part = equal_part(ours, theirs, specials)
        if part >= len(theirs):
            return Comparison(len(ids) - len(prompt) + len(theirs), differing)
        differing.append((ids + ours[:part], tie_gap(model, ids, ours, theirs, part)))
        ids = ids + theirs[: part + 1]
        if not differing[-1][1] <= bound:
            break
    return Comparison(len(ids) - len(prompt), differing)


def check_chat(server: LlamaServer, metadata: dict[str, Any]) -> ChatCheck:
    template, names = metadata.get("tokenizer.chat_template", ""), metadata["tokenizer.ggml.tokens"]
    if not template:
        return ChatCheck()
    bos, eos = (names[metadata[f"tokenizer.ggml.{role}_token_id"]] for role in ("bos", "eos"))
    alone = metadata.get("tokenizer.ggml.add_bos_token", False)  # then llama.cpp leaves it to its tokenizer
    equal = refused = 0
    for conversation in CONVERSATIONS:
        ours = rendered(template, conversation, bos, eos)
        if ours is None:
            refused += 1
            continue
        theirs = server.render(conversation)
        if theirs != (ours.removeprefix(bos) if alone else ours):
            return ChatCheck(equal, refused, (conversation, ours, theirs))
        equal += 1
    return ChatCheck(equal, refused)


def rendered(template: str, conversation: Conversation, bos: str, eos: str) -> str | None:
    """The prompt for the assistant's next turn as transformers renders it, without tools and documents; None where the
    template itself refuses the conversation."""
    given: dict[str, Any] = {"messages": conversation, "bos_token": bos, "eos_token": eos, "tools": None}
    try:
        found = chat_environment().from_string(template)
        return found.render(**given, documents=None, add_generation_prompt=True)
    except TemplateError:
        return None


def check_prompts(tokenizer: Tokenizer, at_most: int) -> Iterator[list[int]]:
    texts = [*SENTENCES.values()]
    for k in range(PROMPTS):
        text = texts[k % len(texts)][k // len(texts) * 40 :]
        yield [tokenizer.eot, *tokenizer.encode(text)][:at_most]


def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    options, rows = SamplingOptions(top_k=1), torch.tensor([prompt], device=model.device)
    made = generate(model, rows, n, options=options)
    return made[0, len(prompt) :].tolist()


def equal_part(ours: list[int], theirs: list[int], specials: set[int]) -> int:
    """Tokens before the first different one; llama.cpp may end earlier, after or before a token that ends a text."""
    equal = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(theirs))
    ended = equal < len(theirs) or len(theirs) == len(ours) or specials & {*ours[max(0, equal - 1) : equal + 1]}
    return equal if ended else max(0, equal - 1)


def tie_gap(model: Transformer, prompt: list[int], ours: list[int], theirs: list[int], equal: int) -> float:
    """By how much our log-probability of our token exceeds that of theirs where they first differ."""
    logits = model(torch.tensor([[*prompt, *ours[:equal]]], device=model.device))[0, -1].double()
    return abs(float(logits[ours[equal]] - logits[theirs[equal]]))


def divergence(model: Transformer, theirs: Tensor, ids: list[int]) -> tuple[float, float]:
    """KL(ours ‖ theirs) in nats, and the largest difference between the log-probabilities of our two likeliest."""
    logits = model(torch.tensor([ids], device=model.device))[0, -1, : len(theirs)]
    ours = logits.double().cpu().log_softmax(-1)
    likeliest = ours.topk(min(2, len(ours))).indices
    return float((ours.exp() * (ours - theirs)).sum()), float((ours - theirs)[likeliest].abs().max())


def check_strings(n: int, *, normalized: bool) -> Iterator[str]:
    """Texts of many languages, pieces of them, and random characters; in NFC with `normalized`."""
    draw, lines = random.Random(0), [*SENTENCES.values()]
    letters = [*map(chr, range(32, 0x250)), *sorted(set("".join(lines))), *" \n\t\r'0123456789" * 8]
    for k in range(n):
        if k % 2:
            text = "".join(draw.choice(letters) for _ in range(draw.randint(0, 40)))
        else:
            line = draw.choice(lines) + draw.choice(["", " ", "\n", "  ", "\n\n", "\t"]) + draw.choice(lines)
            start = draw.randint(0, len(line))
            text = line[start : start + draw.randint(0, 120)]
        yield unicodedata.normalize("NFC", text) if normalized else text


@torch.no_grad()
def loss_on(model: Transformer, ids: list[int]) -> float:
    """Mean of -ln p over the tokens of a text after the first, in rows of the model's length, each token once."""
    longest, ids = model.config.max_seq_len, ids[:LOSS_TOKENS]
    total = 0.0
    for start in range(0, len(ids) - 1, longest):
        row = torch.tensor(ids[start : start + longest + 1], device=model.device)
        hidden = model.hidden(row[None, :-1]).flatten(0, 1)
        total += float(linear_cross_entropy(hidden, model.head_weight, row[1:], model.config.vocab_size))
    return total / (len(ids) - 1)
