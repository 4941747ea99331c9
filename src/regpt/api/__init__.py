"""The Python interface: what `import regpt` offers, one short file a subject (docs/api.md). It calls `runs/`."""
