"""What is active: attention backend, number format, versions. Asked for where it runs, not guessed."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.attention import SDPBackend

import regpt
from regpt.model.config import ModelConfig


def attention_backend(
    config: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device, *, masked: bool = False
) -> str:
    """What torch's scaled_dot_product_attention computes attention of this shape with: flash, cudnn, math, …; causal,
    or `masked` as for documents."""
    shape = (1, config.n_head, seq_len, config.n_embd // config.n_head)  # (B, H, T, D)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril() if masked else None
    choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]  (nothing public says it)
    choice = choose(q, q, q, attn_mask=mask, dropout_p=0.0, is_causal=not masked)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def computing_dtype(precision: str) -> torch.dtype:
    """What attention computes in under this precision (TF32 products are of float32 numbers; FP8 is for linears)."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    return {"fp64": torch.float64, **half}.get(precision, torch.float32)


def versions() -> dict[str, str | int | None]:
    """Of regpt, Python and what computes."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "regpt": regpt.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "triton": triton,
        "system": platform.platform(),
    }
