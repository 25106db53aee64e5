"""Reading a stored corpus of recordings without labels."""
