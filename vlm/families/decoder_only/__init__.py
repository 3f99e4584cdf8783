"""Decoder-only models: image tokens in the text stream of a language model."""
