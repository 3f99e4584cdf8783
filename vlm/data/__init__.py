"""Examples: the one schema, sources, the mixture, batches, drawn scenes, the packaged sample."""
