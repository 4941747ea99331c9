"""regpt: train GPTs from scratch. The package in the order of the pipeline:

text/        text → tokens       the GPT-2 tokenizer, training a BPE
data/        tokens → batches    sources, shards, the order of documents, the loader
model/       batch → logits      GPT-2 in plain PyTorch; import from and export to Hugging Face
parallel/    many processes      the mesh, sums over ranks, the launcher
train/       logits → step       loss, optimizer, schedule, the trainer
checkpoint/  state → disk        save, load, verify; `open_model` finds a model by path or name
evals/       model → numbers     validation loss, bits per byte
sample/      model → text        sampling, generation with a key/value cache
report/      run → pictures      one self-contained page a run
tools/       before and beside   the plan of a run, the doctor, the benchmarks
runs/        all of it           composition roots: configuration → objects → Trainer.fit()
cli/         the command line    one short file a command
"""

import time

STARTED = time.perf_counter()  # of this process, before what takes seconds to import

__version__ = "0.1.0"
