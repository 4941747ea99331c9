"""Causal attention on the packed product of queries, keys and values, forward and backward, by cuDNN.

`scaled_dot_product_attention` reaches the same cuDNN kernels, but its backward returns three gradients that must be
copied into one before the next matrix product (six passes over (B, T, C) in each layer). cuDNN reads and writes any
strides, so here it works on the packed tensors: `nvidia-cudnn-frontend` (extra `hopper`) describes the graph.
Algorithm: FlashAttention-2 (Dao 2023).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.model.masks import AttentionMask, sdpa_mask
from regpt.model.ops import attention

CUDNN_TYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT", torch.int32: "INT32"}


@dataclass(frozen=True)
class AttentionShape:
    """Key of a graph: sizes of one packed product; documents is the number of them in `cu_seqlens`, 0 without it."""

    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype
    documents: int = 0

    @property
    def C(self) -> int:
        return self.H * self.D

    @property
    def sequences(self) -> int:
        return self.documents or self.B


@dataclass
class CudnnGraph:
    """A built cuDNN graph, its tensors by name, and the size of its workspace."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


class CudnnAttention:
    """Attention on one device. `qkv` is (B, T, 3·C), the heads of the queries first, then keys, then values.

    Raises:
        ImportError: `nvidia-cudnn-frontend` is not installed.
    """

    name = "cudnn"

    def __init__(self, device: torch.device, *, deterministic: bool = False):
        import cudnn  # pyright: ignore[reportMissingImports]

        self.cudnn, self.device, self.deterministic = cudnn, device, deterministic
        self.handle = cudnn.create_handle()
        self.graphs: dict[tuple[AttentionShape, bool], CudnnGraph] = {}

    def forward(self, qkv: Tensor, n_head: int, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """The heads' outputs (B, T, C), and the log of each softmax's sum, float32, for the backward."""
        documents = cudnn_documents(mask)
        shape = shape_of(qkv, n_head, documents)
        graph = self.graph(shape, backward=False)
        out = qkv.new_empty(shape.B, shape.T, shape.C)
        stats = qkv.new_empty(shape.sequences, shape.H, shape.T, 1, dtype=torch.float32)
        q, k, v = qkv.chunk(3, dim=-1)
        self.run(graph, {"q": q, "k": k, "v": v, "o": out, "stats": stats} | lengths(shape, documents))
        return out, stats

    def backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, n_head: int, mask: AttentionMask
    ) -> Tensor:
        """Gradient of `qkv`, (B, T, 3·C), packed alike."""
        documents = cudnn_documents(mask)
        shape = shape_of(qkv, n_head, documents)
        graph = self.graph(shape, backward=True)
        dqkv = torch.empty_like(qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        dq, dk, dv = dqkv.chunk(3, dim=-1)
        pointers = {"q": q, "k": k, "v": v, "o": out, "do": dout, "stats": stats, "dq": dq, "dk": dk, "dv": dv}
        self.run(graph, pointers | lengths(shape, documents))
        return dqkv

    def run(self, graph: CudnnGraph, pointers: dict[str, Tensor]) -> None:
        workspace = torch.empty(max(graph.workspace_bytes, 1), dtype=torch.uint8, device=self.device)
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        pack = {graph.tensors[name]: tensor.data_ptr() for name, tensor in pointers.items()}
        graph.graph.execute(pack, workspace.data_ptr(), handle=self.handle)

    def graph(self, shape: AttentionShape, *, backward: bool) -> CudnnGraph:
        key = (shape, backward)
        if key not in self.graphs:
            self.graphs[key] = self.build(shape, backward)
        return self.graphs[key]

    def build(self, shape: AttentionShape, backward: bool) -> CudnnGraph:
        cudnn = self.cudnn
        graph = cudnn.pygraph(
            io_data_type=self.type(shape.dtype),
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self.handle,
        )
        tensors: dict[str, Any] = {}
        options: dict[str, Any] = {"attn_scale": 1 / math.sqrt(shape.D), "use_causal_mask": True}
        if shape.documents:
            tensors |= {name: self.integers(graph, name, shape.documents) for name in ("lengths_q", "lengths_kv")}
            tensors |= {name: self.integers(graph, name, shape.documents + 1) for name in ("starts_3c", "starts_c")}
            options |= {
                "use_padding_mask": True,
                "seq_len_q": tensors["lengths_q"],
                "seq_len_kv": tensors["lengths_kv"],
            }
        for name in ("q", "k", "v"):
            tensors[name] = self.heads(graph.tensor, name, shape, 3 * shape.C, tensors)
        if backward:
            self.add_backward(graph, shape, tensors, options)
        else:
            self.add_forward(graph, shape, tensors, options)
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
            raise UserError(
                f"cuDNN {cudnn.backend_version()} with nvidia-cudnn-frontend {cudnn.__version__} cannot compute "
                f"attention of {shape} ({str(error)[:200]}); install the tested pair with pip install 'regpt[hopper]', "
                "or uninstall nvidia-cudnn-frontend, or set train.kernels to plain"
            ) from error
        return CudnnGraph(graph, tensors, graph.get_workspace_size())

    def add_forward(self, graph: Any, shape: AttentionShape, tensors: dict[str, Any], options: dict[str, Any]) -> None:
        inputs = {name: tensors[name] for name in ("q", "k", "v")}
        out, stats = graph.sdpa(name="sdpa", **inputs, generate_stats=True, **options)
        self.output(out, shape, shape.C, tensors)
        stats.set_output(True).set_data_type(self.type(torch.float32))
        tensors |= {"o": out, "stats": stats}

    def add_backward(self, graph: Any, shape: AttentionShape, tensors: dict[str, Any], options: dict[str, Any]) -> None:
        for name in ("o", "do"):
            tensors[name] = self.heads(graph.tensor, name, shape, shape.C, tensors)
        dim, stride = [shape.sequences, shape.H, shape.T, 1], [shape.H * shape.T, shape.T, 1, 1]
        tensors["stats"] = graph.tensor(name="stats", dim=dim, stride=stride, data_type=self.type(torch.float32))
        inputs = {name: tensors[name] for name in ("q", "k", "v", "o", "stats")}
        if shape.documents:
            options |= {"max_total_seq_len_q": shape.B * shape.T, "max_total_seq_len_kv": shape.B * shape.T}
        gradients = graph.sdpa_backward(
            name="sdpa_backward",
            dO=tensors["do"],
            use_deterministic_algorithm=self.deterministic,
            **inputs,
            **options,
        )
        for name, gradient in zip(("dq", "dk", "dv"), gradients):
            self.output(gradient, shape, 3 * shape.C, tensors)
            tensors[name] = gradient

    def heads(self, make: Any, name: str, shape: AttentionShape, token_stride: int, tensors: dict[str, Any]) -> Any:
        """A tensor of (sequences, H, T, D) whose tokens are `token_stride` elements apart."""
        return make(
            name=name,
            dim=[shape.sequences, shape.H, shape.T, shape.D],
            stride=[shape.T * token_stride, shape.D, token_stride, 1],
            data_type=self.type(shape.dtype),
            ragged_offset=tensors[starts(shape, token_stride)] if shape.documents else None,
        )

    def output(self, tensor: Any, shape: AttentionShape, token_stride: int, tensors: dict[str, Any]) -> None:
        """The layout of `heads` for a tensor that the graph writes."""
        tensor.set_output(True).set_dim([shape.sequences, shape.H, shape.T, shape.D])
        tensor.set_stride([shape.T * token_stride, shape.D, token_stride, 1]).set_data_type(self.type(shape.dtype))
        if shape.documents:
            tensor.set_ragged_offset(tensors[starts(shape, token_stride)])

    def integers(self, graph: Any, name: str, n: int) -> Any:
        return graph.tensor(name=name, dim=[n, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.type(torch.int32))

    def type(self, dtype: torch.dtype) -> Any:
        return getattr(self.cudnn.data_type, CUDNN_TYPES[dtype])


def cudnn_documents(mask: AttentionMask) -> Tensor | None:
    """`mask` for cuDNN, whose graphs are causal: the cumulative lengths of its documents, None for whole rows.

    Raises:
        UserError: another kind of mask.
    """
    if not mask.causal or mask.window is not None or mask.tree is not None:
        raise UserError(
            "attention by cuDNN computes causal masks and documents, no windows or trees; set train.kernels to plain"
        )
    return mask.documents


def starts(shape: AttentionShape, token_stride: int) -> str:
    return "starts_c" if token_stride == shape.C else "starts_3c"


def shape_of(qkv: Tensor, n_head: int, cu_seqlens: Tensor | None) -> AttentionShape:
    B, T, C3 = qkv.shape
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return AttentionShape(B, T, n_head, C3 // 3 // n_head, qkv.dtype, documents)


def lengths(shape: AttentionShape, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """Inputs of a cuDNN graph for documents: their lengths, and the offset of each, counted in elements."""
    if cu_seqlens is None:
        return {}
    cu = cu_seqlens.to(torch.int32)
    n = cu.diff()
    return {"lengths_q": n, "lengths_kv": n, "starts_3c": cu * (3 * shape.C), "starts_c": cu * shape.C}


class TorchAttention:
    """The same through `scaled_dot_product_attention`, for machines without `nvidia-cudnn-frontend`."""

    name = "torch"

    def forward(self, qkv: Tensor, n_head: int, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """Output (B, T, C); the second result is empty: the backward recomputes the forward."""
        with torch.no_grad():
            return self.attend(qkv, n_head, mask), qkv.new_empty(0)

    def attend(self, qkv: Tensor, n_head: int, mask: AttentionMask) -> Tensor:
        B, T, C3 = qkv.shape
        q, k, v = (y.view(B, T, n_head, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))  # (B, H, T, D)
        return attention(q, k, v, sdpa_mask(mask, B, T, T, qkv.device)).transpose(1, 2).reshape(B, T, C3 // 3)

    def backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, n_head: int, mask: AttentionMask
    ) -> Tensor:
        with torch.enable_grad():
            again = qkv.detach().requires_grad_()
            return torch.autograd.grad(self.attend(again, n_head, mask), again, dout)[0]
