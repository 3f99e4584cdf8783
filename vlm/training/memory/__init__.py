"""Peak memory of a step, simulated before it is made."""
