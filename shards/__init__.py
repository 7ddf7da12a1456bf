"""Turns images with captions into tar shards and the index that `dist_vse.data` reads."""
