"""BATCH → LOSS: the one definition that training, validation and evaluations share."""

from torch import Tensor

from regpt.model.transformer import Transformer


def loss_sum(
    model: Transformer,
    idx: Tensor,
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed over the valid targets.

    Args:
        idx: (B, T) int64; `positions`, `cu_seqlens` and `dropout_keys` as in `Transformer.hidden`.
        targets: (B, T) int64, the token after each of `idx`; `IGNORE_INDEX` for no target.

    Returns:
        Scalar, float32 (float64 for a float64 model), under autocast too.
    """
    hidden = model.hidden(idx, positions=positions, cu_seqlens=cu_seqlens, dropout_keys=dropout_keys)  # (B, T, C)
    n_vocab = model.config.vocab_size
    return model.ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten(), n_vocab)
