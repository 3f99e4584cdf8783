"""Using a trained model: generation, scoring, and the public tasks over them."""
