"""Prefix decoders: image and prompt see each other, the answer is causal."""
