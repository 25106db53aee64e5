"""Priors: from predicted embeddings to embeddings that a generator expects."""
