"""Faster paths behind the plain ones of `model/`: what they compute is defined there, and tests compare the two.

`select.py` says which are active. `gpt2.py` composes the rest: `cublaslt.py` (matrix products with epilogues),
`attention.py` (cuDNN on packed tensors), `triton_ops.py` (what lies between).
"""
