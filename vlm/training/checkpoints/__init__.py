"""Checkpoints: written, found, read, and told apart."""
