"""Indexes of image and text embeddings, and the search in them."""
