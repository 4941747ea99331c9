"""Faster versions of `model/`, which defines their results; tests compare the two.

`select.py` chooses: a family of models with an entry in its table has a fused path. `gpt2.py` composes GPT-2's from
`cublaslt.py` (matrix products with epilogues), `attention.py` (cuDNN on packed tensors) and `triton_ops.py` (norms,
loss, embedding); `gpt2_fp8.py` is its version in FP8. `graphs.py` replays either as CUDA graphs.
`triton_head.py` is the softmax of a large head in chunks (`model/head.py`); nothing chooses it before it is measured.
"""
