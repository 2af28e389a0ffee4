"""Data sets, loaders, and raw files on their way to them."""
