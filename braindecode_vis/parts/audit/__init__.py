"""Proofs over a finished run, made from its files and by recomputing."""
