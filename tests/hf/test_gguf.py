"""GGUF: our files read by ggml's own package, files written by it opened here, quantisers against its own."""

import functools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import TINY

import tiny
import tokenizer_files
from regpt.checkpoint.open import open_model
from regpt.cli.export import main as export
from regpt.errors import UserError
from regpt.hf.export import export_hf
from regpt.hf.gguf import TYPES, GGUFFile, write_gguf
from regpt.hf.gguf_lora import export_gguf_lora
from regpt.hf.gguf_models import STRETCH, arch_of, export_gguf
from regpt.model.adapter_config import AdapterConfig
from regpt.model.config import ModelConfig
from regpt.model.weights import state_tensors
from regpt.text.open import from_json, open_content
from regpt.text.sentencepiece import sentencepiece_content
from regpt.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

LLAMA3: dict[str, Any] = {"rope_type": "llama3", "rope_factor": 8.0, "rope_theta": 500.0}
LLAMA3 |= {"rope_original_max_seq_len": 32, "rope_low_freq_factor": 1.5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # family and its variant → tokenizer, fields
    "gpt2": ("smollm", {}),
    "gpt2, own head": ("olmo2", {"tie_embeddings": False, "n_inner": 96, "norm_eps": 1e-3}),
    "llama": ("llama3", {"n_kv_head": 2, "tie_embeddings": False, **LLAMA3}),
    "llama, biases": ("qwen", {"bias": "all", "head_size": 32, "rope_theta": 1e6}),
    "llama, linear": ("pythia", {"rope_type": "linear", "rope_factor": 2.5}),
    "llama, sentencepiece": ("sentencepiece", {"tie_embeddings": False}),
    "mistral": ("llama3", {"n_kv_head": 1, "window": 64}),
    "qwen2": ("qwen", {"n_kv_head": 2}),
    "qwen3": ("qwen", {"n_kv_head": 2, "head_size": 24}),
    "olmo2": ("olmo2", {"tie_embeddings": False}),
    "gemma3_text": (
        "sentencepiece",
        {
            "n_layer": 7,
            "window": 9,
            "full_attention_every": 6,
            "rope_local_theta": 1e4,
            "rope_theta": 1e6,
            "head_size": 24,
        },
    ),
    "gemma3_text, pattern": (
        "sentencepiece",
        {
            "n_layer": 3,
            "window": 9,
            "full_attention_every": 2,
            "rope_local_theta": 5e3,
            "rope_type": "linear",
            "rope_factor": 8.0,
        },
    ),
    "smollm3": ("llama3", {"n_layer": 5, "n_kv_head": 2, "no_rope_every": 4}),
}


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    if name == "sentencepiece":
        return open_content(
            lambda: sentencepiece_content(tokenizer_files.sentencepiece_file(tokenizer_files.sentencepiece_pieces())),
            name,
        )
    return from_json(tokenizer_files.file_of(name))


def make(name: str, **fields: Any):
    """A model, whose weights are larger than at initialisation, and its tokenizer."""
    tokenizer, shape = tokenizer_of(SHAPES[name][0]), SHAPES[name][1]
    values = {"n_layer": 2, "n_head": 4, "n_embd": 64, "max_seq_len": 64, "vocab_size": tokenizer.n_vocab}
    config = ModelConfig(family=name.split(",")[0], **(values | shape | fields))  # pyright: ignore[reportArgumentType]
    return tiny.build_model(config=config, dtype=torch.float32).eval(), tokenizer


@pytest.mark.parametrize("name", SHAPES)
def test_an_export_in_f32_opened_again_is_bitwise_the_model_and_has_its_tokenizer(name: str, tmp_path: Path):
    model, tokenizer = make(name)
    assert export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32") == []
    opened = open_model(str(tmp_path / "m.gguf"))
    given, expected = state_tensors(opened.model), state_tensors(model)
    assert given.keys() == expected.keys()
    if name.startswith("gemma"):  # norms' weights are stored plus 1, which rounds
        for key, tensor in expected.items():
            torch.testing.assert_close(given[key], tensor, rtol=0, atol=2**-23 if key.endswith("norm.weight") else 0)
        model = opened.model
    assert all(state_tensors(opened.model)[key].equal(tensor) for key, tensor in state_tensors(model).items())
    idx = torch.arange(40)[None] * 7 % tokenizer.n_vocab
    assert opened.model(idx).equal(model(idx))
    if name != "mistral":  # llama.cpp's name for it is llama
        assert opened.model.config == model.config.normalized()
    assert opened.tokenizer.stop_ids == tokenizer.stop_ids
    assert [opened.tokenizer.encode(text) for text in tokenizer_files.LINES] == [
        *map(tokenizer.encode, tokenizer_files.LINES)
    ]
    if name != "llama, linear":  # Pythia's spaces have a flag that the format lacks
        assert opened.tokenizer.sha256 == tokenizer.sha256


def test_gemma_of_62_layers_scales_queries_by_its_width(tmp_path: Path):
    """llama.cpp knows the 27B by its layers; files without keys of windows have llama.cpp's defaults."""
    fields = {"n_layer": 62, "n_embd": 16, "head_size": 8, "query_pre_attn_scalar": 4}
    model, tokenizer = make("gemma3_text", **fields)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert open_model(str(tmp_path / "m.gguf")).model.config == model.config.normalized()
    with pytest.raises(UserError, match="query_pre_attn_scalar 8"):
        arch_of(model.config.__class__(**{**vars(model.config), "query_pre_attn_scalar": 8}))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices_in_16_bits_are_the_rounded_ones_and_norms_biases_and_positions_stay(kind: str, tmp_path: Path):
    model, tokenizer = make("gpt2")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    given = state_tensors(open_model(str(tmp_path / "m.gguf")).model)
    for name, weight in state_tensors(model).items():
        kept = weight.dim() == 1 or name == "wpe.weight"
        assert given[name].equal(weight if kept else weight.to(dtype).float()), name


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_quantized_weights_are_within_a_step_of_their_block(kind: str, steps: int, tmp_path: Path):
    model, tokenizer = make("llama")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    given = state_tensors(open_model(str(tmp_path / "m.gguf")).model)
    for name, weight in state_tensors(model).items():
        if weight.dim() == 1:
            assert given[name].equal(weight), name
            continue
        step = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / steps
        error = (given[name] - weight).unflatten(1, (-1, 32)).abs() / step
        # q8_0 rounds, and its scale to 11 bits; q4_0 has no +8 for the other side's farthest number.
        assert error.max() <= (0.5 + 127 * 2**-11 if kind == "q8_0" else 1.01), name
        assert error.max() > 0.4


def test_quantisers_and_their_inverses_are_bitwise_those_of_ggml():
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((400, 64)).astype(np.float32) * np.exp(draw.uniform(-25, 9, (400, 1))).astype(
        np.float32
    )
    rows[:50] = np.round(rows[:50] * 4) / 4  # ties
    rows[50:60] = 0
    rows[60:70, :32] = draw.integers(-127, 128, (10, 32)) + 0.5
    rows[60:70, 0] = 127
    rows[70] = -0.0
    for kind in ("q8_0", "q4_0", "bf16", "f16"):
        number = gguf.GGMLQuantizationType[kind.upper()]
        ours = TYPES[kind].encode(rows.reshape(-1, TYPES[kind].block))
        with np.errstate(over="ignore"):
            theirs = gguf.quants.quantize(rows, number)
        assert ours.tobytes() == theirs.tobytes(), kind
        back = gguf.quants.dequantize(theirs, number).reshape(-1)
        assert TYPES[kind].decode(ours.reshape(-1, TYPES[kind].size)).reshape(-1).tobytes() == back.tobytes(), kind


def test_ternary_numbers_are_stored_as_ggml_does_and_others_refused(tmp_path: Path):
    rows = (np.random.default_rng(0).integers(-1, 2, (300, 256)) * np.exp2(np.arange(300) % 17 - 9)[:, None]).astype(
        "f4"
    )
    rows[7] = 0
    ours, number = TYPES["tq2_0"].encode(rows), gguf.GGMLQuantizationType.TQ2_0
    assert ours.tobytes() == gguf.quants.quantize(rows, number).tobytes()
    assert np.array_equal(TYPES["tq2_0"].decode(ours), gguf.quants.dequantize(ours, number))
    assert np.array_equal(TYPES["tq2_0"].decode(ours), rows)
    for fields, sentence in {64: "rows of 64 numbers, .*blocks of 256", 256: "which tq2_0 holds"}.items():
        with pytest.raises(UserError, match=sentence):
            export_gguf(*make("gpt2", n_embd=fields), tmp_path / "m.gguf", "tq2_0")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("adapter", "kind", "sentence"),
    [
        (AdapterConfig(r=2, dora=True), "f32", "adds no DoRA's magnitudes"),
        (AdapterConfig(r=2, targets=("embedding",)), "f32", "adds no adapters of the embedding"),
        (AdapterConfig(r=2, targets=("*", "head"), tied="shared"), "f32", "adds no adapters of the embedding"),
        (AdapterConfig(r=2), "q8_0", "adapters are written in f32, f16, bf16, not in q8_0"),
    ],
)
def test_adapters_that_llama_cpp_lacks_are_refused(adapter: AdapterConfig, kind: str, sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        export_gguf_lora(make("llama")[0].config, adapter, {}, "base", tmp_path / "m.gguf", kind)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "tq2_0"])
def test_ggmls_own_package_reads_our_file(kind: str, tmp_path: Path):
    model, tokenizer = make("llama")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", kind, "{{ messages }}")
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = {name: field.contents() for name, field in read.fields.items()}
    expected = {"architecture": "llama", "file_type": TYPES[kind].file_type, "quantization_version": 2}
    assert {key: keys[f"general.{key}"] for key in expected} == expected
    sizes = {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16}
    assert {key: keys[f"llama.{key}"] for key in sizes} == sizes
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    start = tokenizer.eot
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.add_bos_token"]) == (start, True)
    assert keys["tokenizer.ggml.tokens"][start] == "<|begin_of_text|>"
    assert keys["tokenizer.ggml.token_type"][start] == gguf.TokenType.CONTROL
    assert all(tensor.data_offset % 32 == 0 for tensor in read.tensors)
    ours = GGUFFile(tmp_path / "m.gguf")
    assert {tensor.name for tensor in read.tensors} == {*ours}
    for tensor in read.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        assert (values == ours[tensor.name].numpy()).all(), tensor.name
        assert tensor.tensor_type.name.lower() == (kind if len(shape) > 1 else "f32")


def test_rows_that_the_blocks_do_not_divide_have_f16(tmp_path: Path):
    model, tokenizer = make("qwen3", n_embd=48)
    f16 = export_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    assert "token_embd.weight" in f16
    assert "blk.0.ffn_down.weight" not in f16
    open_model(str(tmp_path / "m.gguf"))


# ---- files of llama.cpp's converter ---------------------------------------------------------------------------------


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(kind: str, settings: dict[str, Any], path: Path, **keys: Any) -> Any:
    """transformers' model as convert_hf_to_gguf.py writes it, with its padding of the vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    tokenizer = tokenizer_of("llama3" if kind == "llama" else "qwen" if kind == "qwen2" else "smollm")
    rows, config = tokenizer.n_vocab + 5, {key: value for key, value in settings.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config | {"vocab_size": rows})).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    writer, hf = gguf.GGUFWriter(path, kind), model.config
    writer.add_context_length(64)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_feed_forward_length(4 * hf.hidden_size if kind == "gpt2" else hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    if kind == "gpt2":
        writer.add_layer_norm_eps(hf.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(hf.num_key_value_heads)
        writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
        writer.add_rope_freq_base(500.0)
    if kind == "llama":
        writer.add_vocab_size(rows)
        writer.add_rope_dimension_count(hf.hidden_size // hf.num_attention_heads)
        inv = 1 / 500.0 ** (torch.arange(0, 8, 2) / 8)
        writer.add_tensor("rope_freqs.weight", (inv / model.model.rotary_emb.inv_freq).numpy())
    tokens(writer, kind, rows)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], hf.num_hidden_layers)
    for name, weight in model.state_dict().items():
        data = weight.numpy()
        if name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = data.T
        if kind == "llama" and ".q_proj" in name:
            data = interleaved(data, hf.num_attention_heads)
        if kind == "llama" and ".k_proj" in name:
            data = interleaved(data, hf.num_key_value_heads)
        if name != "lm_head.weight" or not hf.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


def tokens(writer: Any, kind: str, rows: int) -> None:
    import json

    content = json.loads(tokenizer_files.file_of({"llama": "llama3", "qwen2": "qwen"}.get(kind, "smollm")))
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    names = {i: token for token, i in content["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"llama": "llama-bpe", "qwen2": "qwen2"}.get(kind, "smollm"))
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([5 if i not in names else {None: 1, True: 3, False: 4}[special.get(i)] for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    if kind != "qwen2":  # Qwen 2 names no token that starts a text
        writer.add_bos_token_id(content["added_tokens"][0]["id"])
    writer.add_eos_token_id(content["added_tokens"][1]["id"])
    if kind == "llama":
        writer.add_add_bos_token(True)


STRETCHED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
STRETCHED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 100}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LARGER = TINY | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": PLAIN}
CONVERTED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
    "llama": LARGER | {"rope_parameters": STRETCHED},
    "qwen2": LARGER,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVERTED)
def test_a_file_of_llama_cpps_converter_has_the_logits_of_transformers(kind: str, tmp_path: Path):
    theirs, tokenizer = converted(kind, CONVERTED[kind], tmp_path / "m.gguf")
    opened = open_model(str(tmp_path / "m.gguf"))
    idx = torch.arange(50)[None] * 7 % tokenizer.n_vocab
    expected = theirs(idx).logits[..., : tokenizer.n_vocab]
    torch.testing.assert_close(opened.model(idx), expected, atol=3e-5, rtol=1e-5)
    assert opened.tokenizer.sha256 == tokenizer.sha256
    if kind == "llama":  # found in the divisors
        found = [getattr(opened.model.config, key) for key in STRETCH]
        assert found == [8.0, 1.0, 4.0, 100]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    model, tokenizer = make("llama")
    export_gguf(model, tokenizer, path, "q8_0")
    return path


def changed(path: Path, out: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """The file with other metadata and tensors; None leaves one out."""
    file = GGUFFile(path)
    metadata = {key: value for key, value in (file.metadata | keys).items() if value is not None}
    stored = {name: (file[name], "f32") for name in file} | tensors
    write_gguf(out, metadata, {name: tensor for name, tensor in stored.items() if tensor is not None})
    return out


ONE = (torch.zeros(32), "f32")


@pytest.mark.parametrize(
    ("keys", "tensors", "sentence"),
    [
        ({"general.type": "adapter"}, {}, "holds adapters without a model"),
        ({"general.architecture": "mamba"}, {}, "architecture 'mamba', regpt reads gpt2, llama, qwen2"),
        ({"llama.block_count": None}, {}, "llama.block_count = None, which must be a whole number"),
        ({"llama.block_count": 3}, {}, "lack 'layers.2"),
        ({"llama.attention.head_count": 3}, {}, "n_head = 3 is not divisible by model.n_kv_head = 2"),
        ({"llama.vocab_size": 7}, {}, "contradicts itself: llama.vocab_size is 7"),
        ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count = 8 and heads of 16"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
        ({"llama.rope.freq_base": 10.0}, {}, "contradicts itself: rope_freqs.weight"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, {}, "must be a number"),
        ({"general.alignment": 24}, {}, "general.alignment is 24"),
        ({"tokenizer.ggml.model": "bert"}, {}, "tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.model": "llama"}, {}, "has no list tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, {}, "differ in number"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.scores": [0.5] * 403,
                "tokenizer.ggml.bos_token_id": 9999,
            },
            {},
            "its bos and eos tokens are 9999",
        ),
        ({"tokenizer.ggml.pre": "tekken"}, {}, "splits text as 'tekken', regpt reads gpt-2"),
        ({"tokenizer.ggml.tokens": ["a"]}, {}, "contradicts itself: it has 1 tokens, its embedding has 403 rows"),
        ({"tokenizer.ggml.token_type": [1]}, {}, "contradicts itself: it has 403 tokens and types of 1"),
        ({"tokenizer.ggml.merges": ["q zz"]}, {}, "a merge joins tokens that are not in its vocabulary"),
        ({"tokenizer.ggml.bos_token_id": 1000}, {}, "its bos token is 1000, and it has 403 tokens"),
        ({}, {"blk.0.attn_q.weight": None}, "lack 'layers.0.self_attn.q_proj.weight'"),
        ({}, {"blk.0.ffn_gate_inp.weight": ONE}, "tensor 'blk.0.ffn_gate_inp.weight', which regpt's model lacks"),
        ({}, {"output_norm.weight": ONE}, "'norm.weight' has shape"),
        ({}, {"output_norm.weight": (torch.full((64,), torch.nan), "f32")}, "not finite"),
        ({}, {"token_embd.weight": None}, "no token_embd.weight"),
    ],
)
def test_a_contradiction_or_what_we_lack_is_one_sentence(
    keys: dict[str, Any], tensors: dict[str, Any], sentence: str, sound: Path, tmp_path: Path
):
    path = changed(sound, tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(UserError, match=sentence) as refused:
        open_model(str(path))
    assert "\n" not in str(refused.value)


def test_a_type_of_tensor_that_we_lack_is_named_with_those_that_we_have(sound: Path, tmp_path: Path):
    data = bytearray(sound.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at : at + 4] == struct.pack("<I", 8)
    for code, given in ((14, "q6_K"), (99, "number 99")):
        data[at : at + 4] = struct.pack("<I", code)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(UserError, match=f"of type {given}, regpt reads f32, f16, bf16, q8_0, q4_0"):
            open_model(str(tmp_path / "m.gguf"))


def test_a_truncated_file_is_refused_wherever_it_ends(sound: Path, tmp_path: Path):
    data, path = sound.read_bytes(), tmp_path / "m.gguf"
    for size in [0, 3, 4, 7, 20, *range(24, 6000, 97), *range(6000, len(data), 9973), len(data) - 40]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="is truncated" if size >= 4 else "is not a GGUF file"):
            open_model(str(path))


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (b"GGML....", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has version 1 of the format"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "is truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "is truncated"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 0, 1, 1, b"k", 77), "metadata of the unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 62), "is truncated"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "metadata of the unknown type 9|is truncated"),
        (b"GGUF" + struct.pack("<IQQQ2s", 3, 0, 1, 2, b"\xff\xfe") + bytes(64), "is not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQsI", 3, 1, 0, 1, b"t", 9) + bytes(64), "has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None"),
    ],
)
def test_a_damaged_head_is_one_sentence(head: bytes, sentence: str, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(head)
    with pytest.raises(UserError, match=sentence) as refused:
        open_model(str(tmp_path / "m.gguf"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"family": "gpt_neox"}, "model.family gpt_neox"),
        ({"family": "mixtral", "n_expert": 4, "n_expert_active": 2}, "model.family mixtral"),
        ({"family": "gpt2", "activation": "relu"}, "model.activation relu"),
        ({"family": "gpt2", "attention_scale_by_layer": True}, "attention_scale_by_layer"),
        ({"family": "llama", "rope_fraction": 0.5}, "rope_fraction 0.5"),
        ({"family": "mistral", "window": 8}, "model.window 8"),
        ({"family": "qwen2", "bias": "none"}, "model.bias none"),
        ({"family": "qwen2", "head_size": 32}, "heads that are not n_embd wide"),
        ({"family": "llama", "no_rope_every": 4}, "no_rope_every 4"),
        ({"family": "gemma3_text", "window": 8}, "model.full_attention_every 0"),
        ({"family": "gemma3_text", "full_attention_every": 6}, "model.window 0"),
        (
            {"family": "gemma3_text", "window": 8, "full_attention_every": 6, "query_pre_attn_scalar": 5},
            "model.query_pre_attn_scalar 5",
        ),
    ],
)
def test_a_model_that_llama_cpp_lacks_is_refused_in_one_sentence(fields: dict[str, Any], reason: str):
    config = ModelConfig(**{"n_layer": 2, "n_head": 4, "n_embd": 64, "max_seq_len": 64} | fields)
    with pytest.raises(UserError, match=f"llama.cpp has no architecture.*{reason}.*gpt2, llama, .*--format hf"):
        arch_of(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tekken", r"splits text.*gpt-2, olmo, smollm, llama-bpe"),
        ("llama2", "two pieces for which it lacks a merge"),  # trained, one merge a piece
        ("mistral", "two pieces for which it lacks a merge"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(name: str, reason: str, tmp_path: Path):
    tokenizer = tokenizer_of(name)
    model = make("gpt2", vocab_size=tokenizer.n_vocab)[0]
    with pytest.raises(UserError, match=f"{reason}.*--format hf"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert not [*tmp_path.iterdir()]


def test_a_weight_beyond_float16_is_refused(tmp_path: Path):
    model, tokenizer = make("gpt2")
    model.h[0].mlp.c_fc.weight.data[3, 4] = 1e6
    with pytest.raises(UserError, match=r"'blk.0.ffn_up.weight' holds numbers beyond f16's range"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    assert not [*tmp_path.iterdir()]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_export_writes_a_file_that_every_command_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from regpt.cli.sample import main as sample

    model, tokenizer = make("llama")
    folder, file = export_hf(model, tokenizer, tmp_path / "hf"), tmp_path / "m.gguf"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    assert export([str(folder), "--format", "gguf", "--type", "q8_0", "--out", str(file)]) == 0
    assert f"{file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert GGUFFile(file).metadata["tokenizer.chat_template"] == "{{ bos_token }}"
    assert sample([str(file), "--prompt", "the", "-n", "2", "--max-new-tokens", "4"]) == 0
    assert export([str(file), "--format", "gguf", "--type", "q8_0", "--out", str(tmp_path / "again.gguf")]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="exists, an export needs a new file"):
        export([str(file), "--format", "gguf", "--out", str(file)])
    with pytest.raises(UserError, match="there is no folder"):
        export([str(file), "--format", "gguf", "--out", str(tmp_path / "no" / "m.gguf")])
    with pytest.raises(UserError, match="belong to --format gguf"):
        export([str(file), "--check", "--out", str(tmp_path / "x")])
