"""Contrastive models: images and texts in one space."""
