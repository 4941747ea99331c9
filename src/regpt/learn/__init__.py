"""Explanations: one page a topic, with a picture, a program, an exercise and its answer (`regpt explain`)."""
