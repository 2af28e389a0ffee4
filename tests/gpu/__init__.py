"""What only a GPU can show; ``python -m tests.gpu`` runs it."""
