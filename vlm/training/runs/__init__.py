"""Runs of recipes: settings, parts, training, evaluation, export."""
