"""Train visual-semantic embeddings with exact, very large batches."""

__version__ = "0.1.0"
