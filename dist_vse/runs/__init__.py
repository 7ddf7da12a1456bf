"""A run's folder: config, metrics, checkpoints, lease."""
