"""The losses over the global batch: exact on any number of ranks, in linear memory."""
