"""What a step cost and achieved, in numbers that can be compared with other systems."""

import torch

from regpt.model.config import ModelConfig

# Dense bfloat16 peaks in FLOP/s from NVIDIA's data sheets, by a part of the device's name; SXM unless stated.
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # float16: it has no bfloat16 units
}


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 per weight of a matrix product, head included, plus attention.

    Attention is 12·n_layer·n_embd·T, without a discount for causality (Chowdhery et al. 2022, appendix B).
    """
    block = 12 * config.n_embd**2  # c_attn 3, c_proj 1, c_fc 4, c_proj 4
    matmul = config.n_layer * block + config.vocab_size * config.n_embd
    return 6 * matmul + 12 * config.n_layer * config.n_embd * seq_len


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet bfloat16 peak of `device`, None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that this process has held on `device` so far, in GiB; None where nothing counts it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
