"""Encoders, heads and tokenizers: the sole owner of timm and transformers.

Import from the modules (`models.build`, `models.dual_encoder`, `models.tokenizer`): this file
stays empty so that a data worker that unpickles a tokenizer loads neither library.
"""
