"""TEXT → TOKENS: tokenizers. No torch here."""
