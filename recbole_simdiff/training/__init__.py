"""The training loop, what listens to it and what stops it."""
