"""MODEL → TEXT."""
