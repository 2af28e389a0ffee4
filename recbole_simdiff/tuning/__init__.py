"""Searches for the best setting of a model."""
