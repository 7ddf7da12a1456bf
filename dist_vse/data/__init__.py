"""From shards to batches: every sample once an epoch, in one order for any number of readers."""
