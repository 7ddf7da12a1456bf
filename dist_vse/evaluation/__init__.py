"""Retrieval over all ranks."""
