"""Figures of merit: arrays in, numbers out; nothing here knows of models."""
