"""The commands of `vlm`, by what they do; torch and its like are imported when one runs."""
