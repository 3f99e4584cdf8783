"""Rows to micro-batches in worker processes."""
