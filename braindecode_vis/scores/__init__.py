"""The rows that `evaluate` writes: one file per family of scores."""
