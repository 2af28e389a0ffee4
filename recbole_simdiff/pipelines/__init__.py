"""Methods that are several runs."""
