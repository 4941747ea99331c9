"""Text to token shards: sources, filters, encoding in partitions, and the import of other formats."""
