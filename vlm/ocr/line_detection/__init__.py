"""Lines of text on a page, found without a model."""
