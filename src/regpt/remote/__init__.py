"""Other machines: downloads, the Hugging Face hub, runs in buckets; with retries, checksums, one sentence an error."""

from regpt.files import ADDRESS


def is_address(name: str) -> bool:
    """Whether `name` is an address like s3://bucket/runs/a, not a path; C:\\runs is a path."""
    return "://" in name and ADDRESS.match(name) is not None
