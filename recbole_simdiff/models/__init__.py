"""One paper a file; ``registry`` finds them by name."""
