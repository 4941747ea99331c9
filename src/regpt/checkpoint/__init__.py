"""STATE → DISK and back; `open_model` serves every command."""
