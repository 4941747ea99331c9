"""Composition roots: configuration → objects → `Trainer.fit`. The only place that sees a whole `RunConfig`."""
