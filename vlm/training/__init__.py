"""Training: stages as values, the loop, checkpoints, the run folder."""
