"""Use a trained model: search a collection, write its embeddings, classify without training."""
