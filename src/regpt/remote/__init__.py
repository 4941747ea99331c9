"""Other machines: downloads, the Hugging Face hub, runs in buckets; with retries, checksums, one sentence an error."""
