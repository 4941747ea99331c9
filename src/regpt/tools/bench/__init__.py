"""How fast training and sampling are on this machine, and the lecture's ladder of what makes training fast."""
