"""Families of vision-language model: plain modules that take finished parts."""
