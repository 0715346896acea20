"""Tokenizers: one module per kind of file, the reading of a model's own one, and streaming text out of token ids."""
