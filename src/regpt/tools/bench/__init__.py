"""How fast training and sampling are on this machine."""
