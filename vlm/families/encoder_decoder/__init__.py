"""Encoder-decoder models: image tokens as the memory of a text decoder."""
