"""Causal attention, forward and backward, by cuDNN: on the packed product of queries, keys and values, or on three
tensors, where keys and values may have fewer heads and a window is allowed (`kernels.masked`).

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
from regpt.model.masks import AttentionMask

CUDNN_TYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT", torch.int32: "INT32"}


@dataclass(frozen=True)
class AttentionShape:
    """Key of a graph.

    Attributes:
        H, G: heads of the queries, and of the keys and values.
        documents: the number of them in `cu_seqlens`, 0 without it.
        window: as in `AttentionMask`.
        packed: q, k and v are parts of one product.
    """

    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype
    documents: int
    G: int
    window: int | None = None
    packed: bool = True

    @property
    def C(self) -> int:
        return self.H * self.D

    @property
    def sequences(self) -> int:
        return self.documents or self.B

    def heads(self, name: str) -> int:
        return self.G if name in ("k", "v", "dk", "dv") else self.H

    def token_stride(self, name: str) -> int:
        """Elements from a token to the next."""
        joined = self.packed and name not in ("o", "do")
        return (self.H + 2 * self.G if joined else self.heads(name)) * self.D

    @property
    def ragged_stats(self) -> bool:
        """Statistics as (B·T, H), not (documents, H, T)."""
        return not self.packed and self.documents > 0


@dataclass
class CudnnGraph:
    """A built cuDNN graph, its tensors by name, and the size of its workspace."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int


class CudnnAttention:
    """Attention on one device. `qkv` is (B, T, (H + 2·G)·D), the heads of the queries first, then keys, then values;
    `heads` is (H, G).

    Raises:
        ImportError: `nvidia-cudnn-frontend` is not installed.
    """

    name = "cudnn"

    def __init__(self, device: torch.device, *, deterministic: bool = False):
        import cudnn  # pyright: ignore[reportMissingImports]

        self.cudnn, self.device, self.deterministic = cudnn, device, deterministic
        self.handle = cudnn.create_handle()
        self.graphs: dict[tuple[AttentionShape, bool], CudnnGraph] = {}

    def forward(self, qkv: Tensor, heads: tuple[int, int], mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """The heads' outputs (B, T, C), and the log of each softmax's sum, float32, for the backward."""
        documents = cudnn_documents(mask)
        return self.attend(shape_of(qkv, heads, documents), split_heads(qkv, heads), documents)

    def backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, heads: tuple[int, int], mask: AttentionMask
    ) -> Tensor:
        """Gradient of `qkv`, packed alike."""
        documents = cudnn_documents(mask)
        shape = shape_of(qkv, heads, documents)
        dqkv = torch.empty_like(qkv)
        self.differentiate(shape, split_heads(qkv, heads), (dout, out, stats), split_heads(dqkv, heads), documents)
        return dqkv

    def attend(self, shape: AttentionShape, qkv: tuple[Tensor, ...], documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, C) and statistics of q, k and v, whose tokens are as far apart as `shape` has it."""
        q, k, v = qkv
        out = q.new_empty(shape.B, shape.T, shape.C)
        sizes = (shape.B * shape.T, shape.H) if shape.ragged_stats else (shape.sequences, shape.H, shape.T, 1)
        stats = q.new_empty(sizes, dtype=torch.float32)
        graph = self.graph(shape, backward=False)
        self.run(graph, {"q": q, "k": k, "v": v, "o": out, "stats": stats} | lengths(shape, documents))
        return out, stats

    def differentiate(
        self,
        shape: AttentionShape,
        qkv: tuple[Tensor, ...],
        results: tuple[Tensor, Tensor, Tensor],
        gradients: tuple[Tensor, ...],
        documents: Tensor | None,
    ) -> None:
        """Write the `gradients` of q, k and v; `results` are the output's gradient, the output and the statistics."""
        names = ("q", "k", "v", "do", "o", "stats", "dq", "dk", "dv")
        pointers = dict(zip(names, (*qkv, *results, *gradients), strict=True))
        self.run(self.graph(shape, backward=True), pointers | lengths(shape, documents))

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
        if shape.window is not None:  # keys fewer than this number of positions before the query
            options["sliding_window_length"] = shape.window
        if shape.documents:
            tensors |= {name: self.integers(graph, name, shape.documents) for name in ("lengths_q", "lengths_kv")}
            tensors |= {name: self.integers(graph, name, shape.documents + 1) for name in offsets(shape)}
            options |= {
                "use_padding_mask": True,
                "seq_len_q": tensors["lengths_q"],
                "seq_len_kv": tensors["lengths_kv"],
            }
        for name in ("q", "k", "v"):
            tensors[name] = self.heads(graph.tensor, name, shape, tensors)
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
        self.output(out, "o", shape, tensors)
        stats.set_output(True).set_data_type(self.type(torch.float32))
        if shape.ragged_stats:
            stats.set_dim([shape.sequences, shape.H, shape.T, 1]).set_stride(stats_stride(shape))
            stats.set_ragged_offset(tensors[starts(shape.H)])
        tensors |= {"o": out, "stats": stats}

    def add_backward(self, graph: Any, shape: AttentionShape, tensors: dict[str, Any], options: dict[str, Any]) -> None:
        for name in ("o", "do"):
            tensors[name] = self.heads(graph.tensor, name, shape, tensors)
        tensors["stats"] = graph.tensor(
            name="stats",
            dim=[shape.sequences, shape.H, shape.T, 1],
            stride=stats_stride(shape),
            data_type=self.type(torch.float32),
            ragged_offset=tensors[starts(shape.H)] if shape.ragged_stats else None,
        )
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
            self.output(gradient, name, shape, tensors)
            tensors[name] = gradient

    def heads(self, make: Any, name: str, shape: AttentionShape, tensors: dict[str, Any]) -> Any:
        """A tensor of (sequences, heads, T, D) whose tokens are `shape.token_stride` elements apart."""
        token_stride = shape.token_stride(name)
        return make(
            name=name,
            dim=[shape.sequences, shape.heads(name), shape.T, shape.D],
            stride=[shape.T * token_stride, shape.D, token_stride, 1],
            data_type=self.type(shape.dtype),
            ragged_offset=tensors[starts(token_stride)] if shape.documents else None,
        )

    def output(self, tensor: Any, name: str, shape: AttentionShape, tensors: dict[str, Any]) -> None:
        """The layout of `heads` for a tensor that the graph writes."""
        token_stride = shape.token_stride(name)
        tensor.set_output(True).set_dim([shape.sequences, shape.heads(name), shape.T, shape.D])
        tensor.set_stride([shape.T * token_stride, shape.D, token_stride, 1]).set_data_type(self.type(shape.dtype))
        if shape.documents:
            tensor.set_ragged_offset(tensors[starts(token_stride)])

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


def starts(token_stride: int) -> str:
    return f"starts_{token_stride}"


def offsets(shape: AttentionShape) -> dict[str, int]:
    """Names of the tensors of offsets that a graph for documents reads, and the elements of a token in each."""
    strides = {shape.token_stride(name) for name in ("q", "k", "o")} | ({shape.H} if shape.ragged_stats else set())
    return {starts(stride): stride for stride in sorted(strides)}


def stats_stride(shape: AttentionShape) -> list[int]:
    H, T = shape.H, shape.T
    return [H * T, 1, H, 1] if shape.ragged_stats else [H * T, T, 1, 1]


def shape_of(qkv: Tensor, heads: tuple[int, int], cu_seqlens: Tensor | None) -> AttentionShape:
    B, T, columns = qkv.shape
    H, G = heads
    return AttentionShape(B, T, H, columns // (H + 2 * G), qkv.dtype, documents_in(cu_seqlens), G)


def split_heads(qkv: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """The queries, keys and values of a packed product."""
    H, G = heads
    D = qkv.size(-1) // (H + 2 * G)
    return qkv.split([H * D, G * D, G * D], dim=-1)


def documents_in(cu_seqlens: Tensor | None) -> int:
    return 0 if cu_seqlens is None else cu_seqlens.numel() - 1


def lengths(shape: AttentionShape, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """Inputs of a cuDNN graph for documents: their lengths, and the offset of each, counted in elements."""
    if cu_seqlens is None:
        return {}
    cu = cu_seqlens.to(torch.int32)
    n = cu.diff()
    return {"lengths_q": n, "lengths_kv": n} | {name: cu * stride for name, stride in offsets(shape).items()}
