"""Memory and time of a training step, before it runs; `regpt.runs.plan` makes the plan of them."""
