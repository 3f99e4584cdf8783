"""Cross-attention towers: a language model whose layers read image tokens through gated blocks."""
