"""Bricks that models are built of: torch and RecBole's layers only."""
