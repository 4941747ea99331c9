"""MODEL → HTTP: an engine behind OpenAI's interface. See docs/serve.md."""
