"""The products of `kernels.cublaslt` in plain PyTorch: their meaning, for tests on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


class TorchProducts:
    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: str = "none",
        bias: Tensor | None = None,
        aux: Tensor | None = None,
        add: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        wide = torch.float64 if a.dtype in (torch.float32, torch.float64) else torch.float32
        a, b = (a.T if transpose_a else a).to(wide), (b.T if transpose_b else b).to(wide)
        result = a @ b
        if scale is not None:
            result = result * scale.to(wide)
        if add is not None:
            result = result + add.to(wide)
        if epilogue in ("bias", "gelu_aux_bias"):
            assert bias is not None
            result = result + bias.to(wide)
        if epilogue == "gelu_aux_bias":
            assert aux is not None
            aux.copy_(result)
            result = F.gelu(aux.to(wide), approximate="tanh")
        if epilogue.startswith("dgelu"):
            assert aux is not None
            with torch.enable_grad():
                before = aux.to(wide).detach().requires_grad_()
                result = result * torch.autograd.grad(F.gelu(before, approximate="tanh").sum(), before)[0]
        if epilogue == "dgelu_bgrad":
            assert bias is not None
            bias.copy_(result.sum(0))
        if epilogue == "bgradb":
            assert bias is not None
            bias.copy_(a.sum(1))
        return out.copy_(result)
