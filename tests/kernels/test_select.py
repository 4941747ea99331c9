import re
from dataclasses import replace

import pytest
import torch

import tiny
from regpt.errors import UsageError
from regpt.kernels import select
from regpt.kernels.select import select_kernels
from regpt.model.families import make_model

DROPOUT = replace(tiny.CONFIG, dropout=0.1)


def test_the_fused_path_is_refused_for_dropout(hopper):
    with pytest.raises(
        UsageError, match=r"fused, but the fused path computes no dropout, model\.dropout is 0\.1; set train\.kernels"
    ):
        select_kernels("fused", tiny.build_model(dtype=torch.float32, config=DROPOUT), hopper, "bf16")


def test_a_cpu_takes_the_plain_path_and_says_why():
    chosen = select_kernels("auto", tiny.build_model(), tiny.CPU, "bf16")
    assert chosen.name == "plain"
    assert "NVIDIA GPU, this is cpu" in chosen.reason


def test_asking_for_the_fused_path_where_it_cannot_be_had_is_an_error():
    sentence = r"train\.kernels is fused, but the fused path needs an NVIDIA GPU.*set train\.kernels"
    with pytest.raises(UsageError, match=sentence):
        select_kernels("fused", tiny.build_model(), tiny.CPU, "bf16")


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has an H100 and triton."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr("regpt.kernels.select.find_spec", lambda name: name == "triton")
    return torch.device("cuda")


def test_hopper_takes_the_fused_path(hopper):
    chosen = select_kernels("auto", tiny.build_model(dtype=torch.float32), hopper, "bf16")
    assert chosen.name == "fused"
    assert "pip install 'regpt[hopper]'" in chosen.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "fp32"}, "train.precision is fp32"),
        ({"deterministic": True}, "train.deterministic is true"),
        ({"recompute": True}, "train.activation_checkpointing is true"),
        ({"model": tiny.build_model(dtype=torch.float32, config=DROPOUT)}, "model.dropout is 0.1"),
        ({"model": tiny.build_model(pad_vocab=False, dtype=torch.float32)}, "set train.pad_vocab"),
        ({"model": tiny.build_model()}, "float64"),
    ],
)
def test_what_the_fused_path_cannot_do_takes_the_plain_one(hopper, change, reason):
    given = {"model": tiny.build_model(dtype=torch.float32), "precision": "bf16"} | change
    chosen = select_kernels("auto", device=hopper, **given)
    assert chosen.name == "plain"
    assert reason in chosen.reason


@pytest.mark.parametrize("n_embd", [32, 24])
@pytest.mark.parametrize("broken", [None, "Triton 0 compiles its rounding to FP8 wrongly on this GPU"])
def test_fp8_takes_the_fused_path_where_its_kernels_work(hopper, monkeypatch, n_embd, broken):
    tried = []
    monkeypatch.setattr(select, "rounding_obstacle", lambda device, width: tried.append((device, width)) or broken)
    model = make_model(replace(tiny.CONFIG, n_embd=n_embd, n_head=n_embd // 8))
    reason = "in FP8 the fused path needs n_embd to be a multiple of 16" if n_embd % 16 else broken
    chosen = select_kernels("auto", model, hopper, "fp8")
    assert chosen.name == ("fused" if reason is None else "plain")
    if reason is None:
        assert select_kernels("fused", model, hopper, "fp8").name == "fused"
    else:
        assert chosen.reason == reason
        with pytest.raises(UsageError, match=re.escape(f"train.kernels is fused, but {reason}; set train.kernels to")):
            select_kernels("fused", model, hopper, "fp8")
    assert tried == ([] if n_embd % 16 else [(hopper, 32)] * 2)


def test_a_family_without_an_entry_takes_the_plain_path_and_one_with_an_entry_its_own(hopper, monkeypatch):
    model = tiny.build_model(dtype=torch.float32)
    entry = select.FusedFamily(lambda model, precision: "it is round", lambda model, *_: lambda *_: model.head_weight)
    monkeypatch.setattr(select, "FAMILIES", {"other": entry})
    assert (
        select_kernels("auto", model, hopper, "bf16").reason == "there is no fused path for models of the family gpt2"
    )
    model.config = replace(tiny.CONFIG)
    object.__setattr__(model.config, "family", "other")
    assert select_kernels("auto", model, hopper, "bf16").reason == "it is round"
    idx = torch.zeros(1, 1)
    assert select.fused_loss(model, hopper)(idx, idx, None, None) is model.head_weight


LLAMA = tiny.FAMILY_CONFIGS["llama"]
EIGHT = replace(LLAMA, n_head=3, n_kv_head=1)  # heads of 8


@pytest.mark.parametrize(
    ("config", "precision", "reason"),
    [
        (EIGHT, "bf16", None),
        (LLAMA, "bf16", "heads of a multiple of 8, up to 128; they are of 4"),
        (
            replace(EIGHT, bias="qkv"),
            "bf16",
            "computes model.bias = 'none', the model has 'qkv'",
        ),
        (replace(EIGHT, activation="gelu"), "bf16", "computes model.activation = 'silu'"),
        (
            replace(EIGHT, n_inner=44),
            "bf16",
            "n_inner to be a multiple of 8, model.n_inner is 44",
        ),
        (replace(EIGHT, dropout=0.1), "bf16", "computes no dropout, model.dropout is 0.1"),
        (EIGHT, "fp8", "computes in bfloat16, train.precision is fp8"),
        (EIGHT, "fp16", "computes in bfloat16, train.precision is fp16"),
    ],
)
def test_llamas_that_the_fused_path_computes(hopper, config, precision, reason):
    chosen = select_kernels("auto", make_model(config), hopper, precision)
    assert chosen.name == ("fused" if reason is None else "plain")
    assert reason is None or reason in chosen.reason


def test_frozen_parameters_take_the_plain_path(hopper):
    model = tiny.build_model(dtype=torch.float32)
    model.wpe.weight.requires_grad_(False)
    assert "frozen" in select_kernels("auto", model, hopper, "bf16").reason


def test_older_gpus_take_the_plain_path_unless_asked(hopper, monkeypatch):
    model = tiny.build_model(dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select_kernels("auto", model, hopper, "bf16").name == "plain"
    assert select_kernels("fused", model, hopper, "bf16").name == "fused"
    sentence = r"in FP8 the fused path needs compute capability 8\.9 or more, NVIDIA H100 has less"
    with pytest.raises(UsageError, match=sentence):
        select_kernels("fused", model, hopper, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"8\.0 or more"):
        select_kernels("fused", model, hopper, "bf16")
