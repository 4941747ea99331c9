"""A model's sizes, counted on the model itself (built without memory), so that they cannot differ from it."""

from dataclasses import dataclass

from torch import nn

from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, without_memory
from regpt.train.metrics import flops_per_token


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on.

    Attributes:
        parameters: without vocabulary padding, the tied head once.
        embeddings: of `parameters`, those of tokens (the tied head with them) and positions.
        padded: what is in memory.
        matrices: weights of matrix products, the padded head included: those that bfloat16 copies are made of.
        vocab_rows: rows of the head, padded.
        flops_per_token: forward and backward, at the real vocabulary (`train.metrics`).
    """

    parameters: int
    embeddings: int
    padded: int
    matrices: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_rows: int
    seq_len: int
    flops_per_token: int

    @property
    def product_flops(self) -> int:
        """FLOPs of matrix products for one token, forward and backward, as they are computed: padding included."""
        return 6 * self.matrices

    @property
    def block_weights(self) -> int:
        """Weights of the matrix products in blocks, without the head."""
        return self.matrices - self.vocab_rows * self.n_embd

    @property
    def block_flops(self) -> int:
        """FLOPs of those products for one token, forward and backward."""
        return 6 * self.block_weights

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention for one token, forward and backward, without a discount for causality."""
        return 12 * self.n_layer * self.n_embd * self.seq_len


def shape_of(config: ModelConfig, seq_len: int, *, pad_vocab: bool) -> Shape:
    """Count a model of this shape."""
    with without_memory():
        model = Transformer(config, pad_vocab=pad_vocab)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return Shape(
        parameters=count_parameters(model),
        embeddings=(config.vocab_size + config.max_seq_len) * config.n_embd,
        padded=sum(p.numel() for p in model.parameters()),
        matrices=linear + model.head_weight.numel(),
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        vocab_rows=model.head_weight.size(0),
        seq_len=seq_len,
        flops_per_token=flops_per_token(config, seq_len),
    )
