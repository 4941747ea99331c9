"""Without the extra `serve` and OpenAI's client there is nothing to test."""

from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if not all(map(find_spec, ("fastapi", "uvicorn", "openai"))) else []
