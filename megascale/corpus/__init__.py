"""Text to token shards, and from shards to the batches of a step."""
