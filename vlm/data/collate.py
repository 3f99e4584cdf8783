"""Rows become a batch, padded or packed end to end; views of equal pixel size are stacked."""

from __future__ import annotations
