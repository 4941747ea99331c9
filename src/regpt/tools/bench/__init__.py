"""How fast training, batches and sampling are on this machine, and the lecture's ladder of what makes training fast."""
