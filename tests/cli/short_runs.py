"""Flags of a run that takes a second."""

SHAPE = ["--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.max-seq-len", "16"]
RUN = ["--data.seq-len", "16", "--train.batch-tokens", "64", "--train.micro-batch-rows", "2"]
SHORT = [
    "--train.steps",
    "3",
    "--optim.warmup-steps",
    "1",
    "--sample.prompt",
    "the cat",
    "--sample.max-new-tokens",
    "4",
]
