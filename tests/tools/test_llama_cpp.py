"""Our GGUF files in llama.cpp itself."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizer_files
from regpt.checkpoint.base import AdapterParts, plain_shapes
from regpt.checkpoint.open import OpenModel, open_model
from regpt.errors import UserError
from regpt.hf import gguf_models
from regpt.hf.gguf import GGUFFile
from regpt.hf.gguf_models import export_gguf
from regpt.model.adapter_config import AdapterConfig
from regpt.model.adapters import Merged, adapt, adapter_parameters, base_tensors
from regpt.model.weights import load_weights, state_tensors
from regpt.runs.export import check_adapters, check_export, export_adapters_gguf, export_model_gguf, refuse_difference
from regpt.text.open import from_json
from regpt.tools import llama_cpp
from regpt.tools.llama_cpp import (
    CONVERSATIONS,
    ChatCheck,
    Comparison,
    LlamaCheck,
    check_prompts,
    check_with_llama_cpp,
    compared,
    equal_part,
    loss_on,
    rendered,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from test_gguf import SHAPES, make

pytestmark = pytest.mark.gguf
STRINGS, NEW_TOKENS = 100, 40


@pytest.fixture
def llama_cpp_installed():
    pytest.importorskip("xllamacpp")


def checked(name: str, kind: str, path: Path, strings: int = STRINGS, new_tokens: int = NEW_TOKENS) -> LlamaCheck:
    model, tokenizer = make(name, max_seq_len=124)
    export_gguf(model, tokenizer, path, kind)
    opened = open_model(str(path))
    return check_with_llama_cpp(path, opened.model, opened.tokenizer, strings, new_tokens)


LORA = AdapterConfig(r=3, alpha=5.0, rslora=True)


def with_adapters(name: str, adapter: AdapterConfig, **fields: Any) -> OpenModel:
    """A model with random adapters, merged, as a run of them is opened."""
    model, tokenizer = make(name, max_seq_len=124, **fields)
    shapes = plain_shapes(model.config)
    own = adapt(make(name, max_seq_len=124, **fields)[0], adapter)
    load_weights(own, state_tensors(model))
    base = Merged(shapes, {k: v.clone() for k, v in base_tensors(own).items()}, {}, adapter)
    draw = torch.Generator().manual_seed(3)
    tensors = {k: torch.randn(p.shape, generator=draw) * 0.1 for k, p in adapter_parameters(own).items()}
    load_weights(model, Merged(shapes, base.base, tensors, adapter))
    return OpenModel(model, tokenizer, 1, name, adapter=AdapterParts(adapter, tensors, "", "base", lambda: base))


@pytest.mark.usefixtures("llama_cpp_installed")
@pytest.mark.parametrize(
    ("name", "adapter"),
    [("gpt2", LORA), ("llama", replace(LORA, targets=("*", "head")))],
    ids=["gpt2, its fused product", "llama, its permuted rows and its head"],
)
def test_llama_cpp_adds_our_adapters_to_a_base_as_we_do(
    name: str, adapter: AdapterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llama_cpp, "PROMPTS", 2)
    opened = with_adapters(name, adapter)
    assert "for the base 'base'" in export_adapters_gguf(opened, tmp_path / "lora.gguf", "f32")
    assert " greedy tokens as ours" in check_adapters(opened, tmp_path / "lora.gguf", "f32", 1)
    assert opened.adapter is not None
    weights, model = opened.adapter.weights(), make(name, max_seq_len=124)[0]
    alone, both = (model(torch.arange(20)[None]) for model in (load_weights(model, weights), opened.model))
    assert (alone - both).abs().max() > 0.1  # so adapters were added


@pytest.mark.usefixtures("llama_cpp_installed")
def test_llama_cpp_runs_a_ternary_base_with_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_cpp, "PROMPTS", 2)
    opened = with_adapters("llama", replace(LORA, base="ternary"), n_embd=256, n_inner=512, n_layer=1)
    f16, lora = export_model_gguf(opened, tmp_path / "m.gguf", "tq2_0")
    assert (f16, lora) == ([], tmp_path / "m-lora.gguf")
    types = {name: stored.type.code for name, stored in GGUFFile(tmp_path / "m.gguf").stored.items()}
    assert (types["blk.0.attn_k.weight"], types["blk.0.ffn_down.weight"], types["token_embd.weight"]) == (35, 35, 1)
    printed = check_export(opened, tmp_path / "m.gguf", "tq2_0", "", 1, lora)
    assert " greedy tokens as ours" in printed
    assert float(printed.partition("at most ")[2].split()[0]) < 0.1  # llama.cpp rounds activations to 8 bits


@pytest.mark.usefixtures("llama_cpp_installed")
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "mistral"])
def test_llama_cpp_computes_and_tokenizes_what_we_do(name: str, tmp_path: Path):
    found = checked(name, "f32", tmp_path / "m.gguf")
    assert (found.positions >= 20 * 8, found.strings, found.different) == (True, STRINGS, None)
    arch = gguf_models.ARCH_OF[name.split(",")[0]]
    refuse_difference(found, "f32", llama_cpp.LARGEST_KL[arch], llama_cpp.LARGEST_TIE[arch])
    assert found.tokens > 300  # some of the prompts are ended by a token that ends texts
    if arch not in llama_cpp.GELU:
        assert found.equal_tokens == found.tokens


@pytest.mark.usefixtures("llama_cpp_installed")
def test_the_check_finds_rows_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = make("llama", max_seq_len=124)
    export_gguf(model, tokenizer, tmp_path / "sound.gguf", "f32")
    opened = open_model(str(tmp_path / "sound.gguf"))
    monkeypatch.setattr(gguf_models, "permuted", lambda name, tensor, shape, back: tensor)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    found = check_with_llama_cpp(tmp_path / "m.gguf", opened.model, tokenizer, 1, 5)
    with pytest.raises(UserError, match="computes another model than ours"):
        refuse_difference(found, "f32", 1e-5, 1e-5)


@pytest.mark.usefixtures("llama_cpp_installed")
@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=pytest.mark.slow), "q4_0"])
def test_the_check_prints_what_a_type_costs(kind: str, tmp_path: Path):
    model, tokenizer = make("llama", max_seq_len=48)
    export_gguf(model, tokenizer, tmp_path / "original.gguf", "f32")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    (tmp_path / "text.txt").write_text(" ".join(tokenizer_files.LINES), encoding="utf-8")
    printed = check_export(
        open_model(str(tmp_path / "original.gguf")), tmp_path / "m.gguf", kind, str(tmp_path / "text.txt"), 20
    )
    first, second = printed.split("\n")
    assert "20 strings become the same tokens" in first
    assert f"in {kind} (" in second
    assert second.endswith("text.txt")
    with pytest.raises(UserError, match="cannot read"):
        check_export(open_model(str(tmp_path / "original.gguf")), tmp_path / "m.gguf", kind, str(tmp_path / "no.txt"))


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp_installed")
@pytest.mark.parametrize("name", ["gpt2", "gpt2, own head", "llama", "llama, linear", "llama, sentencepiece", "qwen2"])
def test_ten_thousand_strings_and_two_thousand_tokens(name: str, tmp_path: Path):
    found = checked(name, "f32", tmp_path / "m.gguf", 10_000, 100)
    refuse_difference(found, "f32", 1e-4 if "gpt2" in name else 1e-5, 5e-3 if "gpt2" in name else 0.0)


@pytest.mark.usefixtures("llama_cpp_installed")
def test_a_file_that_llama_cpp_cannot_load_is_one_sentence(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="cannot load"):
        llama_cpp.LlamaServer(tmp_path / "m.gguf", 64)


def test_without_xllamacpp_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match=r"pip install 'regpt\[gguf\]'"):
        llama_cpp.LlamaServer(tmp_path / "m.gguf", 64)


@pytest.mark.parametrize(
    ("ours", "theirs", "equal"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 0, 3], [1], 1),  # it ended before the token 0, which ends a text
        ([1, 0, 3], [1, 0], 2),  # or after it
        ([1, 2, 3], [1], 0),  # it ended for no reason
        ([1, 2, 3], [], 0),
    ],
)
def test_greedy_tokens_are_equal_up_to_the_first_different_one(ours: list[int], theirs: list[int], equal: int):
    assert equal_part(ours, theirs, {0}) == equal


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (LlamaCheck(9, 9, 0.0, 1e-6, 0, 1, 1, "é"), "makes other tokens of 'é'"),
        (LlamaCheck(9, 8, 0.1, 1e-6, 0, 1, 1, None), "8 of 9 greedy tokens"),
        (LlamaCheck(9, 9, 0.0, 1e-3, 0, 1, 1, None), "KL divergence is 1.0e-03 nats, at most 1e-05"),
        (LlamaCheck(9, 9, 0.0, float("nan"), 0, 1, 1, None), "KL divergence is nan"),
    ],
)
def test_a_difference_in_float32_is_refused(found: LlamaCheck, sentence: str):
    with pytest.raises(UserError, match=sentence):
        refuse_difference(found, "f32", 1e-5, 1e-5)
    if found.different is None:
        refuse_difference(found, "q8_0", 1e-5, 1e-5)


def test_prompts_begin_as_documents_do_and_differ():
    tokenizer = from_json(tokenizer_files.file_of("llama3"))
    prompts = [*check_prompts(tokenizer, 24)]
    assert {prompt[0] for prompt in prompts} == {tokenizer.eot}
    assert len({*map(tuple, prompts)}) == len(prompts) == 20


@torch.no_grad()
def test_the_loss_of_a_text_counts_each_token_once():
    model, tokenizer = make("llama", max_seq_len=16)
    ids = torch.arange(41) * 7 % tokenizer.n_vocab
    losses = [
        torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        for row in (ids[:17], ids[16:33], ids[32:])
    ]
    assert loss_on(model, ids.tolist()) == pytest.approx(float(sum(losses)) / 40, rel=1e-5)


# ---- chat templates

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3_CHAT = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
CHATS = {"chatml": CHATML, "llama 3": LLAMA3_CHAT, "llama 2": LLAMA2_CHAT, "no system": NO_SYSTEM}


@pytest.mark.parametrize("name", CHATS)
def test_our_rendering_is_that_of_transformers(name: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    for conversation in CONVERSATIONS:
        ours = rendered(CHATS[name], conversation, "<s>", "</s>")
        given = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        try:
            theirs = render_jinja_template([conversation], chat_template=CHATS[name], **given)[0][0]
        except Exception:  # jinja's, of the template
            theirs = None
        assert ours == theirs
        assert (ours is None) == (name == "no system" and conversation[0]["role"] == "system")


@pytest.mark.usefixtures("llama_cpp_installed")
@pytest.mark.parametrize(("name", "model"), [*((name, "llama") for name in CHATS), ("llama 2", "llama, sentencepiece")])
def test_llama_cpp_renders_the_chat_template_of_a_file_as_transformers_does(name: str, model: str, tmp_path: Path):
    made, tokenizer = make(model, max_seq_len=48)
    export_gguf(made, tokenizer, tmp_path / "m.gguf", "f32", CHATS[name])
    opened = open_model(str(tmp_path / "m.gguf"))
    found = check_with_llama_cpp(tmp_path / "m.gguf", opened.model, tokenizer, 1, 1)
    assert found.chat == (ChatCheck(5, 2) if name == "no system" else ChatCheck(7, 0))
    printed = check_export(opened, tmp_path / "m.gguf", "f32", "", 1)
    assert f"the chat template renders {found.chat.equal} conversations as here" in printed
    assert ("(the template refuses 2 others)" in printed) == (name == "no system")


@pytest.mark.usefixtures("llama_cpp_installed")
def test_a_chat_template_that_is_rendered_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, tokenizer = make("llama", max_seq_len=48)
    export_gguf(made, tokenizer, tmp_path / "m.gguf", "f32", CHATML)
    monkeypatch.setattr(llama_cpp, "rendered", lambda *given: f"{rendered(*given)} ")
    with pytest.raises(UserError, match=r"renders the chat template of \[.*Hello.* as '<\|im_start\|>user"):
        check_export(open_model(str(tmp_path / "m.gguf")), tmp_path / "m.gguf", "q8_0", "", 1)


def test_after_a_tie_both_continue_from_llama_cpps_token(monkeypatch: pytest.MonkeyPatch):
    """Ours counts up by one, theirs by two where the last token is 3: one tie, no different tokens after it."""
    ours = lambda model, ids, n: [*range(ids[-1] + 1, ids[-1] + 1 + n)]  # noqa: E731
    monkeypatch.setattr(llama_cpp, "greedy", ours)

    class Server:
        def greedy(self, ids: list[int], n: int) -> list[int]:
            return [t if t <= 3 or ids[-1] > 3 else t + 1 for t in ours(None, ids, n)]

    for gap, expected in ((1e-3, Comparison(10, [([1, 2, 3], 1e-3)])), (1.0, Comparison(3, [([1, 2, 3], 1.0)]))):
        monkeypatch.setattr(llama_cpp, "tie_gap", lambda *_, gap=gap: gap)
        assert compared(None, Server(), [1], 10, set(), 5e-3) == expected  # pyright: ignore[reportArgumentType]
