"""Nothing above the model and its kernels knows the parameters of one family: they ask the model."""

import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "regpt"
# The family's own files: the model, its kernels, the NumPy oracle, and the maps to Hugging Face's names.
OWN = re.compile(r"model/|reference/|hf/|kernels/(gpt2|triton)")
NAMES = re.compile(r"\b(wte|wpe|c_attn|c_proj|c_fc|ln_[12f])\b")
FORMULA = re.compile(r"\b12 ?[*·] ?[\w.]*n_(embd|layer)")  # parameters 12·n_embd², attention 12·n_layer·n_embd·T


def foreign(text: str) -> list[str]:
    """Names of GPT-2's parameters and formulas of its sizes in `text`."""
    return [found.group() for pattern in (NAMES, FORMULA) for found in pattern.finditer(text)]


def test_only_the_familys_own_files_name_its_parameters_or_count_them_by_formula():
    paths = [(path, path.relative_to(SRC).as_posix()) for path in SRC.rglob("*.py")]
    found = {name: foreign(path.read_text(encoding="utf-8")) for path, name in paths if not OWN.match(name)}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text", ["model.wte.weight", "h.1.attn.c_attn.weight", "12 * config.n_embd**2", "12·n_layer·n_embd·T", "block.ln_1"]
)
def test_the_search_finds_names_and_formulas(text: str):
    assert foreign(text)
