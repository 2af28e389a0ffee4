"""Metrics of a trained model under each protocol."""
