"""Models in Hugging Face's format: folders read and written, GPT-2's weights and configuration under both names."""
