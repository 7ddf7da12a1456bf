"""Taking over what the authors' code left: checkpoints, vocabularies, precomputed features."""
