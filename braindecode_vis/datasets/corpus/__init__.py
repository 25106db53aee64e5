"""A corpus of recordings without labels as it lies on disk: reading it."""
