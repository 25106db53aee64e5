"""Corpora of recordings without labels, pretraining on them, and published foundation models."""
