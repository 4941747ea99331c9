"""TOKENS → BATCHES: sources, shards, order, loader."""
