"""What trains a GPT, by hand in NumPy: the oracle for tests, and the page for learners (docs/reference.md)."""
