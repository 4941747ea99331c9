"""RUN → PICTURES."""
