"""Tasks whose replies a model writes: generated questions, exact checkers, and how replies end."""
