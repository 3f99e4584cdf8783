"""Data drawn by rules, whose captions, answers and boxes are true by construction."""
