"""The shape of a model: everything that is needed to build it, nothing about how it is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from regpt.errors import UsageError
from regpt.ranges import Range, check_ranges

# Beyond any machine; a file that asks for more is damaged or made to fill the memory.
LARGEST_SIZE = 1 << 24
LARGEST_DEPTH = LARGEST_EXPERTS = 1 << 12
GPT2_VOCAB_SIZE = 50257  # Radford et al. 2019, section 2.3

FamilyName = Literal[
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gemma3_text",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]
ActivationName = Literal["gelu_tanh", "gelu", "relu", "silu"]
BiasName = Literal["all", "attention", "qkv", "mlp", "none"]
RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class Family:
    """What all models of a family share, and what its members have unless their configuration states otherwise.

    Attributes:
        activation, bias: defaults of the fields of `ModelConfig`.
        gated: MLPs multiply the activation by a second product (Shazeer 2020).
        rotary: positions by rotation (Su et al. 2021) instead of a learned embedding.
        qk_norm: RMSNorm of queries and keys before the rotation: of each head, or of all heads together.
        experts: MLPs of experts and a router (Shazeer et al. 2017).
        norm_after: norms at the output of attention and MLP instead of their input (OLMo et al. 2024, section 3.2).
        norm_offset: is added to the weights of norms.
        layered: layers of two kinds, with a window and without.
    """

    activation: ActivationName = "silu"
    bias: BiasName = "none"
    gated: bool = True
    rotary: bool = True
    qk_norm: Literal["", "head", "all"] = ""
    norm_after: bool = False
    norm_offset: float = 0.0
    layered: bool = False
    experts: bool = False


FAMILIES: dict[str, Family] = {
    "gpt2": Family("gelu_tanh", "all", gated=False, rotary=False),
    "llama": Family(),  # Llama 2 to 3.3, SmolLM 2
    "mistral": Family(),
    "qwen2": Family(bias="qkv"),
    "qwen3": Family(qk_norm="head"),
    "olmo2": Family(qk_norm="all", norm_after=True),
    "smollm3": Family(),
    "gpt_neox": Family("gelu", "all", gated=False),  # Pythia
    "gemma3_text": Family("gelu_tanh", qk_norm="head", norm_offset=1.0, layered=True),
    "mixtral": Family(experts=True),
    "olmoe": Family(qk_norm="all", experts=True),
    "qwen3_moe": Family(qk_norm="head", experts=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer; the defaults are GPT-2 124M (Radford et al. 2019, table 2)."""

    __pydantic_config__ = {"extra": "forbid"}

    family: FamilyName = "gpt2"
    """Architecture."""
    n_layer: Annotated[int, Range(1, LARGEST_DEPTH)] = 12
    """Transformer blocks."""
    n_head: Annotated[int, Range(1, LARGEST_SIZE)] = 12
    """Attention heads; must divide n_embd, unless head_size is given."""
    n_embd: Annotated[int, Range(1, LARGEST_SIZE)] = 768
    """Width of the residual stream."""
    vocab_size: Annotated[int, Range(0, LARGEST_SIZE)] = GPT2_VOCAB_SIZE
    """The tokenizer's real vocabulary size; padding for speed is derived, never stored. 0, in the configuration of a
    run: that of the data."""
    max_seq_len: Annotated[int, Range(1, LARGEST_SIZE)] = 1024
    """Positions: the longest sequence that the model reads."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Rate of dropout in training: of attention's probabilities, of what each block adds, of the embeddings (Radford et
    al. 2018, section 4.1, has 0.1; from GPT-2's size on 0 is usual)."""
    n_kv_head: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """Heads of keys and values, each shared by n_head / n_kv_head queries (Ainslie et al. 2023); 0: n_head."""
    head_size: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """Width of a head; 0: n_embd / n_head."""
    n_inner: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """Width of the MLP; 0: 4 n_embd, for gated MLPs two thirds of that, rounded up to a multiple of 256.
    In families of experts: of each expert."""
    n_expert: Annotated[int, Range(0, LARGEST_EXPERTS)] = 0
    """Experts of a layer; 0: Mixtral's 8 in families of experts, none in the others."""
    n_expert_active: Annotated[int, Range(0, LARGEST_EXPERTS)] = 0
    """Experts that compute a token, chosen by its router; 0: Mixtral's 2, or the one there is."""
    n_expert_shared: Annotated[int, Range(0, LARGEST_EXPERTS)] = 0
    """Further experts that compute every token (Dai et al. 2024, section 3.2)."""
    norm_topk: bool = True
    """The weights of a token's experts are divided by their sum (Mixtral, Qwen 3; OLMoE: not)."""
    expert_bias: bool = False
    """Routers have a bias that only takes part in the choice of experts: what train.balance = bias moves."""
    activation: Literal["", ActivationName] = ""
    """Activation of the MLP; empty: the family's."""
    bias: Literal["", BiasName] = ""
    """Which linear layers have biases; empty: the family's. In GPT-2 `none` leaves out those of LayerNorms too."""
    norm_eps: Annotated[float, Range(0, 1)] = 1e-5
    """Added to the variance in norms."""
    tie_embeddings: bool = True
    """The head is the transposed token embedding (Press & Wolf 2017)."""
    reward_head: bool = False
    """A vector whose product with the hidden state of an answer's last token is the answer's reward; regpt finetune
    with preference.method = reward sets it."""
    attention_scale_by_layer: bool = False
    """GPT-2: divide the scores of layer k = 1, 2, … by k (Mistral's GPT-2 runs)."""
    rope_theta: Annotated[float, Range(0, 1e12, above=True)] = 10_000.0
    """Base of the rotation's wavelengths (Su et al. 2021; Llama 3: 500,000)."""
    rope_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of each head that is rotated (Pythia: 0.25)."""
    rope_type: RopeType = "default"
    """How the wavelengths are stretched for rows longer than trained on: linear (Chen et al. 2023), or llama3: only
    the long ones."""
    rope_factor: Annotated[float, Range(1, 1e6)] = 1.0
    """By how much."""
    rope_low_freq_factor: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    """llama3: wavelengths over rope_original_max_seq_len / this are stretched by the whole factor."""
    rope_high_freq_factor: Annotated[float, Range(0, 1e6, above=True)] = 4.0
    """llama3: wavelengths below rope_original_max_seq_len / this stay."""
    rope_original_max_seq_len: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """llama3: the longest row before the stretch."""
    no_rope_every: Annotated[int, Range(0, LARGEST_DEPTH)] = 0
    """Every so many layers one without rotation (Yang et al. 2025; SmolLM 3: 4); 0: none."""
    window: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """A query sees so many keys, its own included (Mistral 7B: 4096); 0: all before it."""
    full_attention_every: Annotated[int, Range(0, LARGEST_DEPTH)] = 0
    """Gemma 3: every so many layers one without the window (published: 6); 0: none."""
    rope_local_theta: Annotated[float, Range(0, 1e12)] = 0.0
    """Gemma 3: rope_theta of the layers with the window, whose wavelengths are never stretched (published: 10,000); 0:
    rope_theta."""
    query_pre_attn_scalar: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    """Gemma 3: the root of this divides the scores of attention (27B: 168); 0: head_size."""

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise UsageError(
                f"model.vocab_size is {self.vocab_size}, must be at least 1, or 0 for the vocabulary of the data"
            )
        check_ranges("model", self)
        if not self.head_size and self.n_embd % self.n_head:
            raise UsageError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"n_head = {divisors_near(self.n_embd, self.n_head)} would fit"
            )
        if self.n_head % (self.n_kv_head or self.n_head):
            raise UsageError(
                f"model.n_head = {self.n_head} is not divisible by model.n_kv_head = {self.n_kv_head}; "
                f"n_kv_head = {divisors_near(self.n_head, self.n_kv_head)} would fit"
            )
        self.check_family()
        self.check_positions()
        self.check_experts()

    def check_family(self) -> None:
        """Raise a UsageError for a field that the family does not read."""
        derived = self.derived()
        for names, has, why in READ_BY_SOME:
            changed = [x for x in names if getattr(self, x) not in (getattr(ModelConfig, x), derived.get(x))]
            if changed and not has(FAMILIES[self.family]):
                families = ", ".join(name for name, family in FAMILIES.items() if has(family))
                raise UsageError(
                    f"model.{changed[0]} is {getattr(self, changed[0])!r}, but {why.format(self.family)}; leave it "
                    f"out or choose a model.family that reads it: {families}"
                )

    def check_positions(self) -> None:
        """Raise a UsageError where fields of positions contradict each other."""
        whole = self.resolved()
        if FAMILIES[self.family].rotary and (self.rotated_size % 2 or not self.rotated_size):
            raise UsageError(
                f"rotary positions turn pairs, but {self.rope_fraction:g} of heads of {whole.head_size} is "
                f"{self.rotated_size}; choose an even head size"
            )
        for name in STRETCH[STRETCH_READ[self.rope_type] :]:
            if getattr(self, name) != getattr(ModelConfig, name):
                kinds = " or ".join(kind for kind, read in STRETCH_READ.items() if name in STRETCH[:read])
                raise UsageError(
                    f"model.{name} is {getattr(self, name)!r}, which model.rope_type {self.rope_type} does not read; "
                    f"leave it out or set model.rope_type to {kinds}"
                )
        if self.window > self.max_seq_len:
            raise UsageError(
                f"model.window is {self.window} and model.max_seq_len {self.max_seq_len}: no row is longer than the "
                "window; leave out model.window, or choose a smaller one"
            )
        if self.rope_type == "llama3" and not (
            self.rope_original_max_seq_len > 0 and self.rope_low_freq_factor < self.rope_high_freq_factor
        ):
            raise UsageError(
                "model.rope_type llama3 needs rope_original_max_seq_len and rope_low_freq_factor below "
                f"rope_high_freq_factor; they are {self.rope_original_max_seq_len}, {self.rope_low_freq_factor:g} and "
                f"{self.rope_high_freq_factor:g}"
            )

    def unstretched(self) -> "ModelConfig":
        """The same shape with the wavelengths of `rope_theta` alone."""
        return replace(self, rope_type="default", **{name: getattr(ModelConfig, name) for name in STRETCH})

    def full_attention_layers(self) -> list[bool]:
        """Whether each layer sees all keys, also where the others have a window."""
        every = self.full_attention_every
        return [every > 0 and (layer + 1) % every == 0 for layer in range(self.n_layer)]

    def check_experts(self) -> None:
        """Raise a UsageError where fields of experts contradict each other."""
        if not FAMILIES[self.family].experts:
            return
        whole = self.resolved()
        if whole.n_expert_active > whole.n_expert:
            raise UsageError(
                f"model.n_expert_active is {whole.n_expert_active}, but there are {whole.n_expert} experts; make it "
                "smaller or model.n_expert larger"
            )
        if self.bias in ("all", "mlp"):
            raise UsageError(f"model.bias is {self.bias!r}, but experts have no biases; choose attention, qkv or none")

    @property
    def rotated_size(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.resolved().head_size * self.rope_fraction)

    def resolved(self) -> "ModelConfig":
        """The same shape with a value in each field that may stand for the family's or for one derived from others."""
        derived = self.derived()
        values = {name: getattr(self, name) or value for name, value in derived.items()}
        return self if all(getattr(self, name) for name in derived) else replace(self, **values)

    def normalized(self) -> "ModelConfig":
        """The same shape, no field stating what it would stand for anyhow."""
        derived = {name: value for name, value in self.derived().items() if getattr(self, name) == value}
        return replace(self, **{name: type(value)() for name, value in derived.items()})

    def stored(self) -> dict[str, Any]:
        """Fields for a file: those of GPT-2's first format, and the others where they differ from their default."""
        return {
            name: getattr(self, name)
            for name, field in self.__dataclass_fields__.items()
            if name in FIRST_FIELDS or getattr(self, name) != field.default
        }

    def derived(self) -> dict[str, Any]:
        """Values of the fields that may be left empty."""
        family = FAMILIES[self.family]
        inner = -(-8 * self.n_embd // 3 // 256) * 256 if family.gated else 4 * self.n_embd
        routed = {"n_expert": 8, "n_expert_active": min(2, self.n_expert or 8)} if family.experts else {}
        scaled = {"query_pre_attn_scalar": self.head_size or self.n_embd // self.n_head} if family.layered else {}
        return (
            routed
            | scaled
            | {
                "n_kv_head": self.n_head,
                "head_size": self.n_embd // self.n_head,
                "n_inner": inner,
                "activation": family.activation,
                "bias": family.bias,
            }
        )


# What model.json of a checkpoint had in the first format, which states all of it.
FIRST_FIELDS = ("family", "n_layer", "n_head", "n_embd", "vocab_size", "max_seq_len", "dropout")
LAYERED = ("full_attention_every", "rope_local_theta", "query_pre_attn_scalar")
EXPERTS = ("n_expert", "n_expert_active", "n_expert_shared", "norm_topk", "expert_bias")
ROTARY = [name for name in ModelConfig.__dataclass_fields__ if name.startswith("rope_")] + ["no_rope_every"]
# Fields that some families read, which those are, and why the others do not.
READ_BY_SOME: tuple[tuple[Sequence[str], Callable[[Family], bool], str], ...] = (
    (ROTARY, lambda family: family.rotary, "{} has learned positions"),
    (("attention_scale_by_layer",), lambda family: not family.rotary, "{} does not scale attention by layer"),
    (("n_kv_head",), lambda family: family.gated, "{} has a key for each query"),
    (("no_rope_every",), lambda family: family.gated, "{} rotates in all layers"),
    (("head_size",), lambda family: family.rotary, "heads of {} are n_embd / n_head wide"),
    (LAYERED, lambda family: family.layered, "the layers of {} are alike"),
    (EXPERTS, lambda family: family.experts, "{} has no experts"),
)
# Fields of a stretch of the wavelengths, and how many of them, from the first on, each type reads.
STRETCH = ("rope_factor", "rope_original_max_seq_len", "rope_low_freq_factor", "rope_high_freq_factor")
STRETCH_READ: dict[RopeType, int] = {"default": 0, "linear": 1, "llama3": 4}


def divisors_near(n: int, wanted: int) -> str:
    """The three divisors of `n` nearest to `wanted`, in order."""
    fits = [d for d in range(1, min(n, 4 * wanted) + 1) if n % d == 0]
    return ", ".join(map(str, sorted(sorted(fits, key=lambda d: abs(d - wanted))[:3])))
