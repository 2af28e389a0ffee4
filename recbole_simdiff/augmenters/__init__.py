"""What invents interactions before a user's first: DiffuASR's generator, and two random ones."""
