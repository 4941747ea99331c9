"""BATCH → LOGITS: the model, in plain PyTorch.

Shape glossary, for every file of the package: B batch, T time (queries), S time (keys), C n_embd, H heads,
G key/value heads, D head size, V vocabulary, F width of the MLP, L layers.
"""
