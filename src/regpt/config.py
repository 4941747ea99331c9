"""The whole configuration of a run: the sections, each in the room of its consumer, read strictly from TOML.

A file may name the recipe it changes (`recipe = "gpt2-124m"`); what it does not set comes from there. Precedence:
defaults < recipe < file < flags.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from regpt.checkpoint.config import CheckpointConfig
from regpt.data.config import DataConfig
from regpt.engine.config import SampleConfig
from regpt.errors import UsageError, UserError, nearest
from regpt.evals.config import EvalConfig
from regpt.files import at_home, is_file
from regpt.kernels.config import FP8_MULTIPLE
from regpt.model.adapter_config import AdapterConfig
from regpt.model.config import FAMILIES, GPT2_VOCAB_SIZE, ModelConfig
from regpt.structured import MAX_TOML_BYTES, parse_toml, read_small
from regpt.train.config import GrpoConfig, LogConfig, OptimConfig, PreferenceConfig, TrainConfig

# Every key of [data] before shuffle_rows was added: a section with all of them was written by that version.
DATA_BEFORE_SHUFFLE_ROWS = {"path", "mixture", "tokenizer", "seq_len", "order", "document_mask", "seed"}
RETIRED = {"max_seconds"}  # keys of [eval] in the config.toml of older runs


@dataclass(frozen=True)
class RunConfig:
    """One run. No component sees it: each takes its own section."""

    __pydantic_config__ = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    def __post_init__(self) -> None:
        for _, _, seq_len in self.train.batch_ramp:
            if seq_len > self.model.max_seq_len:
                raise UsageError(
                    f"train.batch_ramp has rows of {seq_len} tokens, longer than model.max_seq_len "
                    f"{self.model.max_seq_len}; lower the first or raise the second"
                )
        if self.data.seq_len > self.model.max_seq_len:
            raise UsageError(
                f"data.seq_len {self.data.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}; "
                f"lower the first or raise the second"
            )
        if self.train.precision == "fp8":
            sizes = {"model.n_embd": self.model.n_embd, "data.seq_len": self.data.seq_len}
            sizes |= {f"seq_len of train.batch_ramp at {tokens}": T for tokens, _, T in self.train.batch_ramp}
            for name, size in sizes.items():
                if size % FP8_MULTIPLE:
                    near = max(size // FP8_MULTIPLE, 1) * FP8_MULTIPLE
                    raise UsageError(
                        f"{name} is {size}, train.precision fp8 multiplies sizes that are multiples of {FP8_MULTIPLE}; "
                        f"set it to {near}, say, or train.precision to bf16"
                    )
        if self.optim.state_dtype != "fp32" and self.train.precision == "fp64":
            raise UsageError(
                f"optim.state_dtype is {self.optim.state_dtype}, train.precision fp64 keeps moments in float64; set "
                "one of them to fp32"
            )
        if self.adapter.r and self.train.precision == "fp8":
            raise UsageError("train.precision is fp8, in which no adapters are trained; set it to bf16")
        if self.adapter.base != "none" and self.train.precision == "fp64":
            raise UsageError(
                "adapter.base is for precisions up to fp32, train.precision is fp64; leave one of them out"
            )
        if self.train.mlp_tokens and (FAMILIES[self.model.family].experts or self.adapter.dropout):
            raise UsageError(
                "train.mlp_tokens divides the tokens that an MLP computes at once; experts balance their load over all "
                "of them and adapter.dropout counts them, so leave it out, or the other"
            )
        if self.eval.ema and not self.train.ema_decay:
            raise UsageError(
                "eval.ema asks for an average of the weights, which is not kept; set train.ema_decay, such as 0.999"
            )

    def with_vocab_size(self, n_vocab: int = GPT2_VOCAB_SIZE) -> "RunConfig":
        """The same with a vocabulary of `n_vocab` tokens, unless one was given."""
        return self if self.model.vocab_size else replace(self, model=replace(self.model, vocab_size=n_vocab))

    def sections(self) -> dict[str, dict[str, Any]]:
        """Section → key → value; what is None is left out, as in TOML."""
        return {name: drop_none(values) for name, values in asdict(self).items()}

    def to_toml(self) -> str:
        return tomli_w.dumps(self.sections())


def completed(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Stored sections of a run with the keys that were added since a version of regpt wrote them."""
    return overlay(RunConfig().sections(), with_old_meanings({name: dict(keys) for name, keys in values.items()}))


def with_old_meanings(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, where an older version wrote them, with the row order that it had and without keys that are gone."""
    if isinstance(values.get("eval"), dict):
        values = values | {"eval": {key: value for key, value in values["eval"].items() if key not in RETIRED}}
    data = values.get("data")
    if isinstance(data, dict) and "shuffle_rows" not in data and data.keys() >= DATA_BEFORE_SHUFFLE_ROWS:
        return values | {"data": data | {"shuffle_rows": "none"}}
    return values


def with_home(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, the home folder for `~` in the folders of the data."""
    data = values.get("data")
    if not isinstance(data, dict):
        return values
    data = dict(data)
    if isinstance(data.get("path"), str):
        data["path"] = at_home(data["path"])
    if isinstance(data.get("mixture"), dict):
        data["mixture"] = {at_home(str(folder)): weight for folder, weight in data["mixture"].items()}
    return values | {"data": data}


def drop_none(values: Any) -> Any:
    """`values` without the keys whose value is None: TOML has no null."""
    if isinstance(values, (list, tuple)):
        return type(values)(drop_none(value) for value in values)
    if not isinstance(values, Mapping):
        return values
    return {key: drop_none(value) for key, value in values.items() if value is not None}


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".toml") for path in files("regpt.recipes").iterdir() if path.name.endswith(".toml")
    )


def read_config(name: str) -> RunConfig:
    """The configuration of a recipe by name, or of a TOML file by path.

    Raises:
        UsageError: no such recipe or file, broken TOML, an unknown key, a value of the wrong type or out of range.
        UserError: a file that cannot be read.
    """
    return validate_config(read_values(name), name)


def read_values(name: str) -> dict[str, Any]:
    """Nested values of a recipe or file, over those of the recipe that it names."""
    try:
        values = parse_toml(read_text(name))
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(f"{name} is not valid TOML: {error}; correct the file") from None
    base = values.pop("recipe", None)
    if base is None:
        return values
    if base not in recipe_names():
        raise UsageError(
            f"{name} names the unknown recipe {base!r}{nearest(str(base), recipe_names())}; {known_recipes()}"
        )
    return overlay(read_values(base), values)


def read_text(name: str) -> str:
    if name in recipe_names():
        return files("regpt.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(
            f"no recipe is called {name!r}{nearest(name, recipe_names())}; {known_recipes()}, or give a .toml file"
        )
    if not is_file(path):
        raise UsageError(f"the file {name!r} does not exist; give an existing .toml file or {known_recipes()}")
    try:
        return read_small(path, "make it a readable file, or give another .toml file", MAX_TOML_BYTES).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text; save it as UTF-8, or give another .toml file") from None


def known_recipes() -> str:
    return f"choose from {', '.join(recipe_names())}"


def overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = overlay(under[key], value) if both else value
    return merged


def validate_config(values: dict[str, Any], source: str) -> RunConfig:
    """`values` as a RunConfig, strictly: `"12"` is no number, 12.0 no integer, unknown keys are errors."""
    if isinstance(values.get("model"), dict):
        values = overlay({"model": {"vocab_size": 0}}, values)
    try:
        values = with_home(with_old_meanings(values))
        return TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UsageError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first problem in one sentence: key, value, what is allowed."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(part for part in where if part.isidentifier())
    if first["type"] == "unexpected_keyword_argument":
        known = allowed_keys(where[:-1])
        return f"unknown key {'.'.join(where)!r}{nearest(where[-1], known)}; allowed here: {', '.join(known)}"
    if cause := first.get("ctx", {}).get("error"):
        return str(cause)  # a section's own sentence
    if first["type"] == "missing" and where[-1].isdecimal():  # of a list whose length is fixed
        return f"{key} has the entry {list(first['input'])}, which lacks value {int(where[-1]) + 1}"
    if first["type"] == "tuple_type" and where[-1].isdecimal():  # of a list of lists
        return f"{key} has the entry {first['input']!r}, must be lists inside a list, as [[…], […]]"
    either = where[-1].startswith("literal[")  # one of several types; then each has an error of its own
    errors = [e for e in error.errors() if e["loc"][:-1] == first["loc"][:-1]] if either else [first]
    wanted = " or ".join(e["msg"].removeprefix("Input should be ") for e in errors)
    return f"{key} is {first['input']!r}, must be {wanted}"


def allowed_keys(section: list[str]) -> list[str]:
    """Keys of the section at this path."""
    value: Any = RunConfig()
    for part in section:
        value = getattr(value, part)
    return [f.name for f in fields(value)]
