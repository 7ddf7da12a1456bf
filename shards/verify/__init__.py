"""Read finished shards back: check every sample, or count what they hold."""
