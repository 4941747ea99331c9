"""The former place of `gpt2_json`, which scripts import from here; it is in `regpt.hf.export`."""

from regpt.hf.export import gpt2_json as gpt2_json
